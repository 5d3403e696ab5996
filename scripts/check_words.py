"""Refuse words that have a plain technical word instead, and long first lines of docstrings.

    python scripts/check_words.py [FOLDER]     the folder of the repository; this one otherwise

Exit code 1 and a line for each find. Only words that are wrong in every sense are listed: they hide who acts, or are
names that nothing has any more. Docstrings are those of the package, the ones under its fields and constants included.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

WORDS = {
    "albeit": "although",
    "anybody": "name the client, user or process",
    "beneath": "below, under",
    "bids": "requests",
    "crew": "agent group",
    "everybody": "name the clients, users or processes",
    "for ever": "indefinitely, without end",
    "goes its way": "continue, exit",
    "hear": "receive",
    "heard": "received",
    "hears": "receives",
    "hither": "here",
    "in vain": "without success",
    "lest": "so that not",
    "let go of": "release, free",
    "lets go of": "releases, frees",
    "lockstep": "plan broadcast",
    "mend": "correct, fix, repair",
    "mended": "corrected, fixed, repaired",
    "mends": "corrects, fixes, repairs",
    "misfit": "error, mismatch",
    "misfits": "errors, mismatches",
    "nobody": "no client, no user, no process",
    "odd one out": "straggler",
    "of its own accord": "on its own, automatically",
    "somebody": "name the client, user or process",
    "stood": "was, passed",
    "stretch": "interval, span, range or segment",
    "stretches": "intervals, spans, ranges or segments",
    "theirs": "name whose",
    "thither": "there",
    "told": "sent, reported, distinguished",
    "warden": "agent supervisor",
    "whence": "from where",
    "whereabouts": "session file, position",
    "wherein": "in which",
    "whilst": "while",
    "whoever": "name the client, user or process",
    "wish": "option, request",
    "yonder": "there",
}
"""Each word, and what to write instead."""
MAX_SUMMARY = 90
"""Characters of a docstring's first line."""
PLACES = ("launcher", "conf", "docs", "scripts", "tests", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml")
_PATTERN = re.compile(rf"(?<![a-z])(?:{'|'.join(sorted(WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_WITH_WORDS = frozenset({"check_words.py", "test_scripts.py"})
"""Files that list the words, and test that."""
_SUFFIXES = frozenset({".html", ".j2", ".md", ".py", ".sh", ".yaml", ".yml", ""})


def check(repository: Path) -> Iterator[str]:
    """Yield a line for every place that has one of the words."""
    for file in _files(repository):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            for word in _PATTERN.findall(line):
                yield f"{file.relative_to(repository)}:{number}: {word}; instead: {WORDS[word.lower()]}"


def check_summaries(repository: Path) -> Iterator[str]:
    """Yield a line for every docstring of the package whose first line is too long."""
    for file in sorted((repository / "launcher").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                continue
            if isinstance(text := node.value.value, str):
                length = len(text.strip().partition("\n")[0])
                if length > MAX_SUMMARY:
                    place = f"{file.relative_to(repository)}:{node.lineno}"
                    yield f"{place}: first line of a docstring has {length} characters, at most {MAX_SUMMARY}"


def _files(repository: Path) -> Iterator[Path]:
    for place in PLACES:
        root = repository / place
        for path in [root, *sorted(root.rglob("*"))]:
            hidden = "__pycache__" in path.parts or path.name.startswith(".")
            if path.is_file() and path.suffix in _SUFFIXES and path.name not in _WITH_WORDS and not hidden:
                yield path


def main() -> int:
    """Print the finds; return the exit code."""
    repository = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    finds = [*check(repository), *check_summaries(repository)]
    for line in finds:
        print(line)
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
