"""``python -m launcher.inference.server.image_worker FOLDER FD PARENT``: preprocessing.

Whatever an image does to its decoder, it does to this process alone. Messages are those of the engine's loop in form:
MessagePack behind four bytes of length.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from launcher.config.data.images import BadImage, ImageLimits, image_of_url
from launcher.data.image_store import pack_arrays
from launcher.errors import ConfigError
from launcher.inference.engine.loop import LENGTH_PREFIX
from launcher.models.processor import PER_TOKEN, ImageTextProcessor, load_processor
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import die_with_parent
from launcher.utils.text import printable


class _ImageMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """Base of all messages."""


class PreprocessImage(_ImageMessage, frozen=True, kw_only=True, tag="image"):
    """To a worker: preprocess one image."""

    url: str
    """A data URL."""
    file: str
    """That the model's inputs are written to."""
    max_pixels: int
    max_bytes: int


class WorkerReady(_ImageMessage, frozen=True, kw_only=True, tag="ready"):
    """From a worker that has loaded the processor."""


class ImageDone(_ImageMessage, frozen=True, kw_only=True, tag="done"):
    """From a worker: the file is there."""

    text: str
    """What the processor writes for the image."""
    num_tokens: int
    """Image tokens in it."""
    num_bytes: int
    """Of the file."""


class ImageRefused(_ImageMessage, frozen=True, kw_only=True, tag="refused"):
    """From a worker: an image, or the processor, that cannot be used."""

    why: str


ImageMessage = PreprocessImage | WorkerReady | ImageDone | ImageRefused
_DECODER: msgspec.msgpack.Decoder[ImageMessage] = msgspec.msgpack.Decoder(ImageMessage)


def pack_image_message(message: ImageMessage) -> bytes:
    """Return one frame."""
    payload = msgspec.msgpack.encode(message)
    return LENGTH_PREFIX.pack(len(payload)) + payload


def unpack_image_message(payload: bytes) -> ImageMessage:
    """Return the message of a frame without its length."""
    return _DECODER.decode(payload)


def preprocess(processor: ImageTextProcessor, job: PreprocessImage) -> ImageDone | ImageRefused:
    """Decode an image within its limits, and write the model's inputs for it into a file."""
    limits = ImageLimits(max_pixels=job.max_pixels, max_bytes=job.max_bytes)
    try:
        image = image_of_url(job.url, name="the image", limits=limits).open()
        made = processor.inputs(processor.image_token, [image])
    except BadImage as bad:
        return ImageRefused(why=printable(f"{bad}; {bad.fix}" if bad.fix else str(bad)))
    except (ValueError, ArithmeticError, LookupError, TypeError, MemoryError) as error:  # sizes that no model takes
        return ImageRefused(why=printable(f"the image cannot be preprocessed: {type(error).__name__}: {error}"[:500]))
    packed = pack_arrays({name: array for name, array in made.arrays.items() if name not in PER_TOKEN})
    temporary = Path(f"{job.file}.{os.getpid()}.tmp")
    temporary.write_bytes(packed)
    temporary.rename(job.file)
    (written,) = made.replacements
    num_tokens = written.text.count(processor.image_token)
    return ImageDone(text=written.text, num_tokens=num_tokens, num_bytes=len(packed))


def main(folder: Path, connection: socket.socket) -> None:
    """Preprocess images one after the other until the server closes the connection."""
    stream = connection.makefile("rwb")

    def send(message: ImageMessage) -> None:
        stream.write(pack_image_message(message))
        stream.flush()

    try:
        processor = load_processor(folder, option="model.name")
    except ConfigError as error:
        send(ImageRefused(why=printable(str(error))))
        return
    send(WorkerReady())
    while head := stream.read(LENGTH_PREFIX.size):
        job = unpack_image_message(stream.read(*LENGTH_PREFIX.unpack(head)))
        assert isinstance(job, PreprocessImage), "the server sends nothing else"
        send(preprocess(processor, job))


if __name__ == "__main__":
    die_with_parent(int(sys.argv[3]))
    faulthandler.enable()
    quiet_libraries()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the server handles signals, and closes the connection
    main(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
