"""Fetches the tokenizer of a run's data for ``launch data preview``.

``python -m launcher.jobs.fetch_tokenizer RUN_YAML ANSWER`` writes the folder of the tokenizer into the file ANSWER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.config.data.base import Corpus
from launcher.config.snapshot import load_run
from launcher.data.token_cache import given_folder
from launcher.errors import LauncherError, exit_code_of_rank
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import die_with_parent


def main() -> int:
    """Download or convert the tokenizer, and say where it is."""
    die_with_parent(os.getppid())
    quiet_libraries()
    run = load_run(Path(sys.argv[1]))
    assert isinstance(run.data, Corpus), "checked by the parent"
    try:
        folder = given_folder(run.data, run.model, heartbeat=lambda: None)
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of_rank(error)
    Path(sys.argv[2]).write_text(str(folder), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
