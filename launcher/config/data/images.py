"""Images in rows and requests: found, measured by their header, and decoded within limits.

Nothing is decoded before the header has said how many pixels there are. Formats are PNG, JPEG, WebP, GIF and BMP; the
decoders of others, some of which start programs, are never used. Addresses on the network are refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.utils.text import bytes_text

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded, in Pillow's names."""
_WIDE_MODES = ("I", "F")
"""Beginnings of Pillow's names of formats with more than 8 bits a channel."""
_DATA_URL = re.compile(r"data:(?P<kind>[\w.+/-]*)(?:;[\w.+-]+=[^;,]*)*(?P<base64>;base64)?,", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_DATA_KEYS, _PATH_KEYS = ("bytes", "base64"), ("path", "image", "url", "image_url")
"""Keys of an object that holds an image: of ``datasets``, Transformers and OpenAI."""
IMAGE_OPTIONS = ("image_folder", "max_image_pixels", "max_image_bytes")
"""Options of data that say how images are read."""
_PILLOW_LIMIT = threading.Lock()
"""Held while Pillow's own limit of pixels is off."""


class BadImage(Exception):
    """An image that is not used, and why.

    Attributes:
        fix: what to do instead.
    """

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why)
        self.fix = fix


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """The largest image that is decoded."""

    max_pixels: int = 1 << 25
    """Width times height; 33,554,432 pixels take 96 MiB once they are decoded."""
    max_bytes: int = 20 << 20
    """Of the file."""
    group: str = "job"
    """Of the options ``max_image_pixels`` and ``max_image_bytes``: ``job`` or ``data``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An image within its limits, by its header; it is not decoded yet."""

    name: str
    """For messages: where it was found, or its path."""
    width: int
    height: int
    """Pixels as stored; a camera's orientation may exchange both."""
    num_bytes: int
    limits: ImageLimits
    path: Path | None = None
    """``None`` where the bytes came with the row or request."""
    raw: bytes = field(default=b"", repr=False)

    def read(self) -> bytes:
        """Return the bytes of the file.

        Raises:
            BadImage: it has become too large, or cannot be read any more.
        """
        return self.raw if self.path is None else _read_file(self.path, self.name, self.limits)

    def open(self) -> Image.Image:
        """Return the pixels as RGB, turned as the camera was held.

        Raises:
            BadImage: the data is damaged or cut off.
        """
        return decode(self.read(), name=self.name, limits=self.limits)


def measure(raw: bytes, *, name: str, limits: ImageLimits, path: Path | None = None) -> EncodedImage:
    """Return an image of given bytes after its header is checked; nothing is decoded.

    Raises:
        BadImage: it is no image, or too large.
    """
    _check_bytes(len(raw), name, limits)
    with _opened(raw, name) as image:
        _check_pixels(image.size, name, limits)
        width, height = image.size
    kept = raw if path is None else b""
    return EncodedImage(name=name, width=width, height=height, num_bytes=len(raw), limits=limits, path=path, raw=kept)


def measure_file(path: Path, *, name: str, limits: ImageLimits) -> EncodedImage:
    """Return the image in a file after its header is checked; the file is not read whole.

    Raises:
        BadImage: there is no such file, it is no image, or too large.
    """
    try:
        if not path.is_file():
            raise BadImage(f"{name}: there is no file {path}", "correct the path")
        num_bytes = path.stat().st_size
        _check_bytes(num_bytes, name, limits)
        with path.open("rb") as stream, _opened(stream, name) as image:
            _check_pixels(image.size, name, limits)
            width, height = image.size
    except OSError as error:
        raise BadImage(f"{name}: {path} cannot be read: {error.strerror or error}", "check its permissions") from error
    return EncodedImage(name=name, width=width, height=height, num_bytes=num_bytes, limits=limits, path=path)


def decode(raw: bytes, *, name: str, limits: ImageLimits) -> Image.Image:
    """Return the pixels of an encoded image as RGB, turned as its EXIF orientation says.

    Raises:
        BadImage: it is no image, too large, animated, damaged, or has more than 8 bits a channel.
    """
    from PIL import ImageOps

    _check_bytes(len(raw), name, limits)
    with _opened(raw, name) as image:
        _check_pixels(image.size, name, limits)
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise BadImage(f"{name} is animated", "give a still image")
        if image.mode.startswith(_WIDE_MODES):
            raise BadImage(f"{name} has more than 8 bits a channel ({image.mode})", "save it with 8 bits a channel")
        image.load()
        turned: Image.Image = ImageOps.exif_transpose(image)
        return turned.convert("RGB")


def image_of_url(url: str, *, name: str, limits: ImageLimits) -> EncodedImage:
    """Return the image of a data URL (``data:image/png;base64,…``).

    Raises:
        BadImage: it is another address, which is never fetched; or no image, or too large.
    """
    found = _DATA_URL.match(url)
    if found is None:
        shown = url if len(url) <= 80 else f"{url[:77]}…"
        why = f"{name} is {shown}, and images are not fetched from addresses"
        raise BadImage(why, "give a data URL (data:image/png;base64,…)")
    kind = found["kind"].lower()
    if kind and not kind.startswith("image/"):
        raise BadImage(f"{name} is a data URL of {kind}, not of an image", "give data:image/png;base64,…")
    if not found["base64"]:
        raise BadImage(f"{name} is a data URL without base64", "give data:image/png;base64,…")
    return image_of_base64(url[found.end() :], name=name, limits=limits)


def image_of_base64(text: str, *, name: str, limits: ImageLimits) -> EncodedImage:
    """Return the image of bytes in base64.

    Raises:
        BadImage: it is no base64, no image, or too large; judged by its length before it is decoded.
    """
    _check_bytes(len(text) * 3 // 4 - 2, name, limits)
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"{name} is no valid base64: {error}", "encode the bytes of the file again") from error
    return measure(raw, name=name, limits=limits)


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """Finds the images that rows name: files below one folder, bytes and data URLs."""

    folder: Path
    """Relative paths start here, and no file outside of it is read, whatever links lead to."""
    limits: ImageLimits

    def find(self, value: Any, name: str) -> EncodedImage:
        """Return the image that a value holds.

        Args:
            value: a path, bytes, a data URL, or an object with one of these: ``{"path": …}``, ``{"bytes": …}``.
            name: of the place, for messages.

        Raises:
            BadImage: it is none that can be used.
        """
        if isinstance(value, Mapping):
            return self._find_in_object(value, name)
        if isinstance(value, bytes | bytearray | memoryview):
            return measure(bytes(value), name=name, limits=self.limits)
        if not isinstance(value, str) or not value:
            raise BadImage(f"{name} takes a path, bytes or a data URL, and is {type(value).__name__}", "correct it")
        if value[:5].lower() == "data:":
            return image_of_url(value, name=name, limits=self.limits)
        if _ADDRESS.match(value):
            why = f"{name} is {value}, and images are not fetched from addresses"
            raise BadImage(why, "download it, and give its path")
        return self._find_file(value, name)

    def _find_in_object(self, value: Mapping[str, Any], name: str) -> EncodedImage:
        for key in _DATA_KEYS:
            held = value.get(key)
            if isinstance(held, str) and held and held[:5].lower() != "data:":
                return image_of_base64(held, name=f"{name}.{key}", limits=self.limits)
            if isinstance(held, str | bytes | bytearray | memoryview) and held:
                return self.find(held, f"{name}.{key}")
            if held:
                raise BadImage(f"{name}.{key} takes bytes, and is {type(held).__name__}", "encode them as base64")
        for key in _PATH_KEYS:
            if value.get(key):
                return self.find(value[key], f"{name}.{key}")
        keys = ", ".join((*_DATA_KEYS, *_PATH_KEYS))
        raise BadImage(f"{name} has none of {keys}", "name the image by its path")

    def _find_file(self, value: str, name: str) -> EncodedImage:
        if "\0" in value:
            raise BadImage(f"{name} is no path: it contains a NUL character", "correct the path")
        root = Path(os.path.realpath(self.folder))
        path = Path(os.path.realpath(root / Path(value)))
        if not path.is_relative_to(root):
            why = f"{name} is {value}, outside of {root}"
            raise BadImage(why, "set data.image_folder to a folder above all images")
        return measure_file(path, name=f"{name} ({value})", limits=self.limits)


def image_hash(raw: bytes) -> str:
    """Return what an image's file is recognised by in a cache."""
    return hashlib.sha256(raw).hexdigest()


def _read_file(path: Path, name: str, limits: ImageLimits) -> bytes:
    try:
        with path.open("rb") as stream:
            raw = stream.read(limits.max_bytes + 1)
    except OSError as error:
        raise BadImage(f"{name}: {path} cannot be read: {error.strerror or error}", "check its permissions") from error
    _check_bytes(len(raw), name, limits)
    return raw


def _check_bytes(num_bytes: int, name: str, limits: ImageLimits) -> None:
    if num_bytes > limits.max_bytes:
        why = f"{name} has {bytes_text(num_bytes)}, and an image may have {bytes_text(limits.max_bytes)}"
        raise BadImage(why, f"save it smaller, or raise {limits.group}.max_image_bytes")


def _check_pixels(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        why = f"{name} has {width:,} × {height:,} = {width * height:,} pixels, and an image may have"
        raise BadImage(f"{why} {limits.max_pixels:,}", f"scale it down, or raise {limits.group}.max_image_pixels")
    if not width or not height:
        raise BadImage(f"{name} has {width} × {height} pixels", "give an image with pixels")


@contextmanager
def _opened(source: Any, name: str) -> Iterator[Image.Image]:
    """Yield an image whose header has been read; errors of decoders become ``BadImage``."""
    from PIL import UnidentifiedImageError

    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with _open_header(stream) as image:
            yield image
    except UnidentifiedImageError as error:
        raise BadImage(f"{name} is no image of {', '.join(FORMATS)}", "save it as PNG or JPEG") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the image
        raise BadImage(f"{name} is damaged or cut off: {error}", "copy it again, or save it anew") from error


def _open_header(stream: Any) -> Image.Image:
    """Return an image of which the header is read, whatever its size.

    The caller compares it with the limits. Pillow's own limit would refuse some sizes first, in its words.
    """
    from PIL import Image

    with _PILLOW_LIMIT:
        usual = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(stream, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = usual
