"""Shell completion of groups, options and keys, by Hydra: ``eval "$(launch -sc install=bash)"``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launcher.compose import conf_folder


def run(words: Sequence[str]) -> int:
    """Answer Hydra's completion protocol."""
    import hydra

    def answer_nothing(_: object) -> None:
        """Hydra prints the completion itself and never gets here."""

    entry = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(answer_nothing)
    sys.argv = ["launch", *words]
    entry()
    return 0
