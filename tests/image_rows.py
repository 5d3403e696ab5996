"""Small images, and rows of conversations about them, for tests."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SIZES = ((24, 16), (16, 40), (12, 12), (48, 32), (20, 20), (33, 17))


def picture(number: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Return an image whose pixels differ from place to place and with ``number``."""
    width, height = size
    pixels = [
        ((7 * x + 31 * number) % 256, (11 * y + 5 * number) % 256, (x * y + number) % 256)
        for y in range(height)
        for x in range(width)
    ]
    image = Image.new("RGB", size)
    image.putdata(pixels)
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Return an image as bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG whose header says it has this size; its pixels are missing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(head) - 4) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def write_rows(folder: Path, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    """Write rows as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_image_rows(folder: Path, num_rows: int = 12, *, without: int = 3) -> Path:
    """Write images and conversations: one image or two of changing sizes, and every so many rows none."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_rows):
        names = [f"pictures/{number}-{one}.png" for one in range(0 if number % without == 0 else 2 - number % 2)]
        for one, name in enumerate(names):
            picture(number + one, SIZES[(number + one) % len(SIZES)]).save(folder / name)
        content = [*({"type": "image", "path": name} for name in names), {"type": "text", "text": f"What is {number}?"}]
        answer = {"role": "assistant", "content": f"It is {number}." * (1 + number % 3)}
        rows.append({"messages": [{"role": "user", "content": content}, answer]})
    return write_rows(folder, rows)
