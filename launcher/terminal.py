"""Text that is safe to print on a terminal: what a rank or a file says may hold escape sequences.

An escape sequence can set the clipboard or the title, move the cursor over what was printed before, or make the
terminal type an answer. Colours (SGR) are kept.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

_COLOUR = r"\x1b\[[0-9;:]*m"
_SEQUENCES = re.compile(
    rf"(?P<colour>{_COLOUR})"
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)"  # OSC: title, clipboard, links
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c\n]*(?:\x1b\\|\x9c)"  # DCS, SOS, PM, APC
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: cursor, erasing, modes
    r"|\x1b[ -/]*[0-~]?"  # everything else, and an escape alone
    r"|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]"
)
_RESET = "\x1b[0m"
_COLOURS = re.compile(_COLOUR)
_SURROGATES = re.compile("[\ud800-\udfff]")
_IN_JSON = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), *range(0xD800, 0xE000))}
_WITHOUT_TERMINAL = 100
"""Columns where nothing says how many there are."""


def printable(text: str) -> str:
    """Return ``text`` without control characters and escape sequences; line ends, tabs and colours stay.

    A line whose colour is not reset is reset at its end, so that it does not colour what follows.
    """
    clean = _SURROGATES.sub("\ufffd", _SEQUENCES.sub(lambda found: found["colour"] or "", text))
    return "\n".join(map(_reset, clean.split("\n"))) if "\x1b" in clean else clean


def one_line(text: str) -> str:
    """Return ``text`` as one line without control characters, escape sequences and colours."""
    plain = without_escapes(text)
    return " ".join(plain.split("\n")).replace("\t", " ") if "\n" in plain or "\t" in plain else plain


def without_escapes(text: str) -> str:
    """Return ``text`` without control characters and escape sequences, colours included; line ends and tabs stay."""
    return _SURROGATES.sub("\ufffd", _SEQUENCES.sub("", text))


def json_text(tree: Any) -> str:
    """Return ``tree`` as indented JSON that holds no control character as it is."""
    return json.dumps(tree, indent=2, ensure_ascii=False).translate(_IN_JSON)


def width() -> int:
    """Return the columns of the terminal; 100 where the output is none."""
    return shutil.get_terminal_size((_WITHOUT_TERMINAL, 24)).columns


def _reset(line: str) -> str:
    colours = _COLOURS.findall(line)
    return line + _RESET if colours and colours[-1] not in (_RESET, "\x1b[m") else line
