"""What every corpus keeps."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

import launcher
from launcher.config.data.base import Corpus
from launcher.config.run import Run
from launcher.data.corpus import read_corpus
from launcher.data.dataset import open_splits
from launcher.testing.base import PartContract


class CorpusContract(PartContract):
    """Checks of one corpus: the same text each time, and a cache of tokens for each text."""

    changes: ClassVar[tuple[str, ...]] = ()
    """Overrides, each of which changes the text."""

    @pytest.fixture
    def corpus(self, configured: Run) -> Corpus:
        """Return the options."""
        assert isinstance(configured.data, Corpus)
        return configured.data

    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def test_every_rank_reads_the_same_documents(self, corpus: Corpus) -> None:
        """Order and text are the same at each reading, and a document ends."""
        chunks = list(read_corpus(corpus))
        assert chunks == list(read_corpus(corpus))
        assert any(chunk.ends_document for chunk in chunks)
        assert all(isinstance(chunk.text, str) for chunk in chunks)

    def test_its_fingerprint_changes_with_the_text(self, corpus: Corpus, words: tuple[str, ...]) -> None:
        """Tokens are cached under the fingerprint: an old one would train on other text."""
        prints = [corpus.fingerprint()]
        assert prints == [corpus.fingerprint()]
        for change in self.changes:
            changed = launcher.compose((*words, change)).data
            assert isinstance(changed, Corpus)
            prints.append(changed.fingerprint())
        assert len(set(prints)) == 1 + len(self.changes), prints

    def test_sequences_are_cut_from_it(self, configured: Run) -> None:
        """Both splits have sequences, whose text is of the corpus."""
        splits = open_splits(configured.data, configured.model, sequence_length=16, seed=0)
        assert splits.train.num_sequences > 0
        assert splits.held_out.num_sequences > 0
        assert splits.tokenizer is not None
        text = "".join(chunk.text for chunk in read_corpus(configured.data))  # type: ignore[arg-type]
        start = splits.tokenizer.decode(splits.train.row(0).input_ids.tolist())
        assert text.startswith(start[: len(start) // 2])
