"""Text for people: units, tables, nearest valid names, and text safe for a terminal.

What a rank or a file says may hold escape sequences: ``printable`` and ``one_line`` remove them.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import shutil
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def bytes_text(count: float) -> str:
    """Return a number of bytes in the largest unit that leaves at least 1 (``1.45 GiB``)."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} B" if power == 0 else f"{count:.2f} {_UNITS[power]}"


def duration_text(seconds: float) -> str:
    """Return a time in readable units (``42 s``, ``3 min``, ``2 h 05 min``, ``4 d 3 h``)."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    if hours == 0:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def short_path(path: Path) -> str:
    """Return a path as one would type it in the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def shell_word(text: str) -> str:
    """Return text as one shell word on one line.

    Control characters are written as ``$'…'`` (bash, zsh).
    """
    if not _CONTROLS.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_CONTROLS.sub(_as_escape, escaped)}'"


def shell_command(words: Iterable[str]) -> str:
    """Return words as a command to paste into a shell, on one line."""
    return " ".join(map(shell_word, words))


def _as_escape(found: re.Match[str]) -> str:
    return _NAMED_ESCAPES.get(found[0]) or "".join(f"\\x{byte:02x}" for byte in found[0].encode())


def counted(count: int, noun: str) -> str:
    """Return ``1 rank`` or ``2 ranks``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def cut_middle(text: str, *, limit: int) -> str:
    """Return ``text`` without its middle, where it has more than ``limit`` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n… {len(text) - limit:,} characters are left out …\n{text[-(limit // 2) :]}"


def close_choices(word: str, choices: Iterable[str]) -> list[str]:
    """Return the choices that ``word`` may be a misspelling of, at most three."""
    names = sorted(set(choices))
    same = [name for name in names if name.lower() == word.lower()]
    return same or difflib.get_close_matches(word, names, n=3, cutoff=0.6)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return a phrase that ends an error: the closest choices, or all if none is close."""
    names = sorted(set(choices))
    if close := close_choices(word, names):
        return f"did you mean {' or '.join(close)}?"
    return f"choose from: {', '.join(names)}" if names else "nothing is allowed here"


_COLOUR = r"\x1b\[[0-9;:]*m"
_BIDI = "\u202a-\u202e\u2066-\u2069"
"""Bidirectional marks, which reverse the text after them and so disguise a name or command."""

_SEQUENCES = re.compile(
    rf"(?P<colour>{_COLOUR})"
    # each ends at the next one's beginning: a text of beginnings alone must not be searched to its end for every one
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x90\x98\x9c-\x9f\n]*(?:\x07|\x1b\\|\x9c)"  # OSC: title, clipboard, links
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x90\x98\x9c-\x9f\n]*(?:\x1b\\|\x9c)"  # DCS, SOS, PM, APC
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: cursor, erasing, modes
    r"|\x1b[ -/]*[0-~]?"  # everything else, and an escape alone
    rf"|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f{_BIDI}]"
)

_RESET = "\x1b[0m"
_COLOURS = re.compile(_COLOUR)
_SURROGATES = re.compile("[\ud800-\udfff]")
_IN_JSON = {
    code: f"\\u{code:04x}"
    for code in (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
}
_CONTROLS = re.compile(rf"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029{_BIDI}]")
"""Control characters and line ends, without tabs, which any quotes keep."""
_NAMED_ESCAPES = {"\n": "\\n", "\r": "\\r"}
_WITHOUT_TERMINAL = 100
"""Columns where nothing says how many there are."""


def printable(text: str) -> str:
    """Return ``text`` without control characters and escape sequences.

    Line ends, tabs and colours are kept.

    A line whose colour is not reset is reset at its end, so that it does not colour what follows.
    """
    clean = _SURROGATES.sub("\ufffd", _SEQUENCES.sub(lambda found: found["colour"] or "", text))
    return "\n".join(map(_reset, clean.split("\n"))) if "\x1b" in clean else clean


def one_line(text: str) -> str:
    """Return ``text`` as one line without control characters, escape sequences and colours."""
    plain = without_escapes(text)
    return " ".join(plain.split("\n")).replace("\t", " ") if "\n" in plain or "\t" in plain else plain


def without_escapes(text: str) -> str:
    """Return ``text`` without control characters, escape sequences and colours.

    Line ends and tabs are kept.
    """
    return _SURROGATES.sub("\ufffd", _SEQUENCES.sub("", text))


def json_text(tree: Any) -> str:
    """Return ``tree`` as indented JSON that holds no control character as it is."""
    return json.dumps(tree, indent=2, ensure_ascii=False).translate(_IN_JSON)


def terminal_width() -> int:
    """Return the columns of the terminal; 100 if the output is not a terminal."""
    return shutil.get_terminal_size((_WITHOUT_TERMINAL, 24)).columns


def _reset(line: str) -> str:
    colours = _COLOURS.findall(line)
    return line + _RESET if colours and colours[-1] not in (_RESET, "\x1b[m") else line


_MIN_WIDTH, _MIN_LAST_WIDTH = 12, 30
"""Columns that a cell has at least, where lines are wrapped, and the last of a row."""


def format_table(
    rows: Sequence[Sequence[str]], *, indent: str = "", width: int | None = None, whole: Sequence[int] = ()
) -> Iterator[str]:
    """Yield the rows as lines with aligned columns, two spaces between them.

    Args:
        rows: cells; every row has as many. Control characters and escape sequences in them are left out.
        indent: put before each line.
        width: wrap cells so that lines stay within this many characters, where that leaves room for words.
        whole: columns whose cells are never broken: names that are copied.
    """
    if not rows:
        return
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(num_columns, column)) for column in zip(*rows, strict=True)][:-1]
    if width is not None:
        kept = sum(widths[column] for column in whole)
        free = [size for column, size in enumerate(widths) if column not in whole]
        narrowed = iter(_narrowed(free, room=width - kept - len(indent) - 2 * len(widths) - _MIN_LAST_WIDTH))
        widths = [size if column in whole else next(narrowed) for column, size in enumerate(widths)]
    taken = len(indent) + sum(widths) + 2 * len(widths)
    last = None if width is None else max(_MIN_LAST_WIDTH, width - taken)
    for row in rows:
        cells = [
            *(_wrapped(cell, size) for cell, size in zip(row, widths, strict=False)),
            _wrapped(row[-1], last, breaks=False),
        ]
        for number in range(max(map(len, cells))):
            parts = [lines[number] if number < len(lines) else "" for lines in cells]
            padded = (part + " " * (size - num_columns(part) + 2) for part, size in zip(parts, widths, strict=False))
            yield f"{indent}{''.join(padded)}{parts[-1]}".rstrip()


def _narrowed(widths: list[int], *, room: int) -> list[int]:
    """Return widths that fit into ``room``, the widest narrowed first, none below a minimum."""
    widths = list(widths)
    while sum(widths) > room and max(widths, default=0) > _MIN_WIDTH:
        widest = max(widths)
        widths[widths.index(widest)] = max(_MIN_WIDTH, widest - 1)
    return widths


def _wrapped(cell: str, size: int | None, *, breaks: bool = True) -> list[str]:
    """Return the lines of a cell; ``breaks`` allows breaking a word wider than the column."""
    if size is None or num_columns(cell) <= size:
        return [cell]
    if num_columns(cell) == len(cell):
        return textwrap.wrap(cell, size, break_long_words=breaks, break_on_hyphens=False) or [""]
    lines = [""]
    for word in cell.split():
        room = size - num_columns(lines[-1]) - 1
        if lines[-1] and num_columns(word) <= room:
            lines[-1] += f" {word}"
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while breaks and num_columns(lines[-1]) > size:
            fitting = _prefix_of(lines[-1], size)
            lines[-1:] = [fitting, lines[-1][len(fitting) :]]
    return lines


def num_columns(text: str) -> int:
    """Return the columns of a terminal that text takes; wide letters (CJK, emoji) take two."""
    return len(text) if text.isascii() else sum(map(_columns_of, text))


def _columns_of(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):  # marks on the letter before, and what is not shown
        return 0
    return 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1


def _prefix_of(text: str, size: int) -> str:
    """Return the longest beginning of ``text`` within ``size`` columns, one letter at least."""
    taken = 0
    for at, letter in enumerate(text):
        taken += _columns_of(letter)
        if taken > size and at:
            return text[:at]
    return text
