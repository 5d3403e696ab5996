"""A tokenizer for serving: text and chats to tokens, tokens to text. Imports no torch."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.data.chat_template import (
    DEFAULT_TEMPLATE,
    ChatTemplate,
    TemplateFailed,
    find_template,
    read_templates,
)
from launcher.config.model.image_text import read_image_text
from launcher.errors import ConfigError
from launcher.models.pretrained import tokenizer_folder, tokenizer_folder_option
from launcher.models.tokenizer import (
    byte_of_character,
    decoder_of,
    fallback_byte,
    has_decoder,
    load_transformers_tokenizer,
)
from launcher.utils.files import sha256_of

if TYPE_CHECKING:
    import tokenizers

    from launcher.config.run import Run


_NO_CONTENT = "is null, which only an assistant's may be"
_CONTENT = 'takes text, or a list of parts {"type": "text", "text": "…"}'


class InvalidMessages(Exception):
    """An invalid list of messages.

    Attributes:
        field: which place in it is wrong, as ``messages.1.content``.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field


class ChatTemplateNotFound(Exception):
    """The tokenizer has no such chat template; the message lists its templates."""


def normalize_messages(messages: Any, *, field: str = "messages") -> list[dict[str, str]]:
    """Return messages as templates take them: a role and one text each.

    Args:
        messages: as JSON gives them.
        field: where they stand, for the error.

    Raises:
        InvalidMessages: they are none, and why.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidMessages(field, "takes a list of objects with role and content, at least one")
    return [_normalize_message(message, f"{field}.{number}") for number, message in enumerate(messages)]


def _normalize_message(message: Any, field: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise InvalidMessages(field, "takes an object with role and content")
    for name in message:
        if name not in ("role", "content"):
            raise InvalidMessages(f"{field}.{name}", "no such field")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not role:
        raise InvalidMessages(f"{field}.role", "takes text")
    if content is None and role != "assistant":
        raise InvalidMessages(f"{field}.content", _NO_CONTENT)
    if isinstance(content, list):
        for number, part in enumerate(content):
            is_text = isinstance(part, Mapping) and part.keys() == {"type", "text"} and part["type"] == "text"
            if not is_text or not isinstance(part["text"], str):
                why = 'takes {"type": "text", "text": "…"}'
                if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
                    why = "is an image, and only chats of job=serve take images"
                raise InvalidMessages(f"{field}.content.{number}", why)
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise InvalidMessages(f"{field}.content", _CONTENT)
    # OpenAI's newer word for system; an assistant that said nothing
    return {"role": "system" if role == "developer" else role, "content": content or ""}


def select_template(templates: Mapping[str, str], name: str | None) -> str:
    """Return the template of a name, the default one where no name is given.

    Raises:
        ChatTemplateNotFound: there is none.
    """
    if not templates:
        raise ChatTemplateNotFound("this tokenizer has no chat template")
    wanted = name or DEFAULT_TEMPLATE
    if wanted not in templates:
        raise ChatTemplateNotFound(
            f"this tokenizer has no chat template {wanted[:100]!r}; it has {', '.join(sorted(templates))}"
        )
    return templates[wanted]


def templates_by_name(loaded: str | Mapping[str, str] | None) -> dict[str, str]:
    """Return the templates of a Transformers tokenizer by name; a single one is the default."""
    if isinstance(loaded, str):
        return {DEFAULT_TEMPLATE: loaded}
    return dict(loaded or {})


ChatRenderer = Callable[[Sequence[Mapping[str, Any]], str | None], str]
"""Renders a conversation to text, by a named chat template or the default one.
The text ends where the answer begins."""
END_OF_TEXT = "<|endoftext|>"


class TextTokenizer:
    """Converts text to tokens and back.

    Args:
        inner: the tokenizer, without truncation and padding.
        chat: how its template writes a conversation down; ``None`` where it has none.
        template: changes with that.
        image_token: what a template writes for an image; empty for a model that takes text alone.
        begin: text of the token that begins texts; empty where there is none.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        chat: ChatRenderer | None = None,
        template: str = "",
        image_token: str = "",
        begin: str = "",
    ) -> None:
        self._inner, self._chat = inner, chat
        self.image_token, self._begin = image_token, begin
        text = inner.to_str()
        self.fingerprint = sha256_of(f"{text}\n{template}".encode())
        """Changes with anything that decides how text becomes tokens."""
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest token id.
        Computed once, because a pass over the vocabulary takes as long as a token."""
        self._decode = decoder_of(inner)
        self._is_bytes, self._falls_back = has_decoder(inner, "ByteLevel"), has_decoder(inner, "ByteFallback")
        self._longest = max(map(len, inner.get_vocab(with_added_tokens=True)))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's tokens; ``special`` adds those the tokenizer puts around it (a beginning)."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=special).ids
        return ids

    def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the tokens of several texts without the GIL, which ``encode`` holds."""
        found = self._inner.encode_batch_fast(list(texts), add_special_tokens=special)
        return [each.ids for each in found]

    def max_characters(self, tokens: int) -> int:
        """Return the characters that no text of so many tokens can exceed."""
        if not (self._is_bytes or self._falls_back):  # one token for an unknown word, however long it is
            return sys.maxsize
        shrinks = self._inner.normalizer is not None  # it may drop characters, so take a generous bound
        return tokens * self._longest * (8 if shrinks else 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return self._decode(ids)

    @property
    def mark_in_text(self) -> str:
        """Why a text with :attr:`image_token` in it is refused."""
        return f"a text holds {self.image_token}, which stands for an image of this model; take it out"

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._chat is not None

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, template: str | None = None, images: Sequence[str] = ()
    ) -> list[int]:
        """Return the tokens of a conversation, up to where the answer begins.

        Args:
            messages: with a role and a text each, or parts: ``{"type": "text", "text": …}`` and ``{"type": "image"}``.
            template: name of one of the tokenizer's chat templates; ``None`` is the default.
            images: what the model's processor writes for each image.

        Raises:
            ChatTemplateNotFound: the tokenizer has none, or none of this name.
            InvalidMessages: a text holds what stands for an image.
            ValueError: the template refuses these messages, and why.
        """
        text = self.render(messages, template)
        if self.image_token:
            pieces = text.split(self.image_token)
            if len(pieces) != len(images) + 1:
                raise InvalidMessages("messages", self.mark_in_text)
            text = "".join(part for pair in zip(pieces, (*images, ""), strict=True) for part in pair)
        # a template writes special tokens itself; processors of images add them where it does not begin with one
        special = bool(self.image_token) and not (self._begin and text.startswith(self._begin))
        return self.encode_all([text], special=special)[0]

    def render(self, messages: Sequence[Mapping[str, Any]], template: str | None = None) -> str:
        """Return a conversation as its model wants it, up to where the answer begins.

        Args:
            messages: as for ``encode_chat``.
            template: name of one of the tokenizer's chat templates; ``None`` is the default.

        Raises:
            ChatTemplateNotFound: the tokenizer has none, or none of this name.
            ValueError: the template refuses these messages, and why.
        """
        if self._chat is None:
            raise ChatTemplateNotFound("this tokenizer has no chat template")
        return self._chat(messages, template)

    def bytes_of(self, token: int, *, first: bool = False) -> bytes:
        """Return the bytes that a token adds to a text, perhaps a part of a character.

        Args:
            token: special ones give their name, though a text leaves them out.
            first: whether no other token precedes it: some decoders drop a space there.
        """
        return self._bytes_of(token, first)

    def text_of(self, token: int, *, first: bool = False) -> str:
        r"""Return a token as OpenAI shows it: its text, or ``bytes:\xe4`` where it is no whole text."""
        raw = self.bytes_of(token, first=first)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def is_special(self, token: int) -> bool:
        """Return whether texts leave this token out."""
        return token in self._special

    @functools.cached_property
    def _special(self) -> Mapping[int, str]:
        added = self._inner.get_added_tokens_decoder().items()
        return {number: token.content for number, token in added if token.special}

    @functools.cached_property
    def _before(self) -> tuple[list[int], int]:
        """Return a token to decode others behind, and its text's length; none if none is plain."""
        for token in range(self.vocab_size):
            if token not in self._special and self._decode([token]).isalnum():
                return [token], len(self._decode([token]))
        return [], 0

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019  (lives as long as the server)
    def _bytes_of(self, token: int, first: bool) -> bytes:
        written = self._inner.id_to_token(token)
        if written is None:
            return b""
        if token in self._special:
            return self._special[token].encode()
        if self._is_bytes:
            table = byte_of_character()
            if all(character in table for character in written):
                return bytes(table[character] for character in written)
            return str(written).encode()
        if first and not self._decode([token]):
            return b""
        if self._falls_back and (byte := fallback_byte(written)) is not None:
            return bytes([byte])
        before, length = ([], 0) if first else self._before
        return self._decode([*before, token])[length:].encode()


def open_tokenizer(
    choice: str, run: Run, *, heartbeat: Callable[[], None], template: str | None = None
) -> TextTokenizer:
    """Return the tokenizer that ``job.tokenizer`` names.

    Args:
        choice: the name.
        run: whose model and data may have it.
        heartbeat: called while it is fetched or made.
        template: ``job.chat_template``: the chat template that is used where none is named.

    Raises:
        ConfigError: there is none, or the group data has none; there is no such template.
        EnvironmentProblem: it has to be fetched and cannot be.
    """
    if choice == "bytes":
        return byte_tokenizer()
    if choice == "data":
        from launcher.config.data.base import Corpus
        from launcher.data.token_cache import token_folder

        if not isinstance(run.data, Corpus):
            why = f"data={run.data.kind} has no text, and so no tokenizer"
            raise ConfigError("job.tokenizer", choice, why=why, fix="set job.tokenizer=bytes")
        return TextTokenizer(token_folder(run.data, run.model, heartbeat=heartbeat)[1].inner)
    if choice == "model":
        folder = tokenizer_folder(run.model, heartbeat=heartbeat, option="job.tokenizer")
        option = tokenizer_folder_option(run.model)
        return load_text_tokenizer(folder, template=template, config_option=option)
    return load_text_tokenizer(Path(choice).expanduser(), template=template)


def load_text_tokenizer(
    folder: Path, *, template: str | None = None, config_option: str = "job.tokenizer"
) -> TextTokenizer:
    """Return the tokenizer of a folder, with its chat templates. Imports Transformers.

    Args:
        folder: of the tokenizer.
        template: a name or a file: the chat template that is used where none is named.
        config_option: the option that names the folder, for messages about its config.json.

    Raises:
        ConfigError: there is no fast one, or no such template.
    """
    fix = "set job.tokenizer=bytes, or give the folder of a fast tokenizer"
    loaded = load_transformers_tokenizer(folder, option="job.tokenizer", config_option=config_option, fix=fix)
    inner = loaded.backend_tokenizer
    facts = read_image_text(folder)
    takes_images = facts is not None and facts.processor is not None
    image_token = facts.token if facts is not None and takes_images else ""
    templates = templates_by_name(loaded.chat_template) or (read_templates(folder) if takes_images else {})
    chosen = None if template is None else find_template(template, folder, option="job.chat_template")
    if not templates and chosen is None:
        return TextTokenizer(inner)
    special = {name: value for name, value in loaded.special_tokens_map.items() if isinstance(value, str)}

    def chat(messages: Sequence[Mapping[str, Any]], name: str | None) -> str:
        # A client names one of the tokenizer's; never what it writes is a template.
        text = chosen.source if chosen is not None and not name else select_template(templates, name)
        try:
            made = ChatTemplate(text, special_tokens=special, image_token=image_token)
            return made.render(messages, add_generation_prompt=True)
        except TemplateFailed as failed:
            raise ValueError(str(failed.__cause__ or failed)) from failed

    return TextTokenizer(
        inner,
        chat=chat,
        template=json.dumps([chosen and chosen.source, templates], sort_keys=True),
        image_token=image_token,
        begin=loaded.bos_token or "",
    )


def byte_tokenizer() -> TextTokenizer:
    """Return a tokenizer with one token for each byte, and one that ends a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    byte_of = byte_of_character()
    vocabulary = {character: number for number, character in enumerate(sorted(byte_of, key=byte_of.__getitem__))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return TextTokenizer(inner)
