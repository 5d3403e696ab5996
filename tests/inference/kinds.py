"""Tokenizers of every kind that decodes in a way of its own, and text from every plane of Unicode."""

from __future__ import annotations

import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from launcher.inference.tokenizer import TextTokenizer, byte_tokenizer

WORDS = byte_tokenizer()
SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_VOCABULARY = {
    token: number
    for number, token in enumerate((*SPECIAL, *_BYTES, *"▁abcdefghijklmnopqrstuvwxyz.!,é漢", "▁t", "▁▁", "th", "▁th"))
}


def llama(decoder: decoders.Decoder, start: normalizers.Normalizer | pre_tokenizers.PreTokenizer) -> TextTokenizer:
    """A tokenizer that writes characters it lacks as bytes, as Llama 2, Mistral, Gemma and Phi-3 have it."""
    merges = [("▁", "t"), ("▁", "▁"), ("t", "h"), ("▁t", "h")]
    model = models.BPE(vocab=_VOCABULARY, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    inner = tokenizers.Tokenizer(model)
    if isinstance(start, normalizers.Normalizer):
        inner.normalizer = start
    else:
        inner.pre_tokenizer = start
    inner.decoder = decoder
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return TextTokenizer(inner)


def word_pieces() -> TextTokenizer:
    pieces = ["[UNK]", "[CLS]", "the", "##re", "a", "##a", ".", ",", "漢", "##漢", "##é"]
    inner = tokenizers.Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}))
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens([AddedToken("[CLS]", special=True)])
    return TextTokenizer(inner)


_SPACES = decoders.Replace("▁", " ")
_PREPENDED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS = {
    "byte level": WORDS,
    "llama": llama(
        decoders.Sequence([_SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]), _PREPENDED
    ),
    "gemma": llama(
        decoders.Sequence([_SPACES, decoders.ByteFallback(), decoders.Fuse()]), normalizers.Replace(" ", "▁")
    ),
    "metaspace": llama(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]),
        pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
    ),
    "word pieces": word_pieces(),
}
EXACT = ("byte level", "gemma", "llama")
"""Those that give back any text as it was."""
PLANES = st.integers(0, 16).flatmap(
    lambda plane: st.characters(
        min_codepoint=plane << 16, max_codepoint=(plane << 16) + 0xFFFF, exclude_categories=("Cs",)
    )
)
"""Characters of each plane of Unicode as often as of any other; half of a surrogate pair is none."""
EVERYTHING = st.text(alphabet=st.one_of(PLANES, st.sampled_from(list(" atheé漢.▁\ufffd"))), max_size=30)
