"""Images of requests: preprocessed by worker processes, kept by content in files."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launcher.config.data.images import BadImage, ImageLimits
from launcher.config.inference import API_KEYS_VARIABLE
from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.inference.engine.base import RequestImage
from launcher.inference.engine.loop import LENGTH_PREFIX, MAX_MESSAGE_BYTES
from launcher.inference.server.image_fetcher import ImageFetcher
from launcher.inference.server.image_worker import (
    ImageDone,
    ImageMessage,
    ImageRefused,
    PreprocessImage,
    WorkerReady,
    pack_image_message,
    unpack_image_message,
)
from launcher.inference.server.responses import ApiError

_TIMEOUT_S = 60.0
"""Time that a worker gets for one image; then it is ended."""
_START_TIMEOUT_S = 300.0
"""Time that a worker gets to load the processor."""
_PAUSE_S = 1.0
"""Before a worker that cannot start is started again."""
_MAX_WAITING = 64
"""Images that may wait for a worker."""


class RefusedImage(Exception):
    """An image that is not used; the message is for the client.

    Attributes:
        number: of the image in its request.
    """

    def __init__(self, why: str, number: int = 0) -> None:
        super().__init__(why)
        self.number = number


class NoWorker(Exception):
    """A worker that cannot be started, and why."""


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """An image that the model can be given."""

    image: RequestImage
    text: str
    """What stands for it in the prompt."""
    num_bytes: int
    """Of its file."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    key: str
    url: str
    answer: asyncio.Future[PreparedImage]


class ImagePool:
    """Worker processes that preprocess images, and what they made.

    Everything runs in one event loop.
    A worker has one image at a time. One that ends, or takes too long, fails that image alone, and is replaced.

    Args:
        processor: folder of the model's processor.
        limits: of each image.
        num_workers: processes.
        cache_bytes: of the files; those in use are never removed, and new ones are refused when they take it all.
        timeout_s: for one image.
        fetcher: of images from addresses; without one, all of these are refused.
    """

    def __init__(
        self,
        processor: Path,
        *,
        limits: ImageLimits,
        num_workers: int = 1,
        cache_bytes: int,
        timeout_s: float = _TIMEOUT_S,
        fetcher: ImageFetcher | None = None,
    ) -> None:
        self._fetcher = fetcher
        self._processor, self._limits, self._timeout_s = processor, limits, timeout_s
        self._num_workers, self._cache_bytes = num_workers, cache_bytes
        self._folder = tempfile.TemporaryDirectory(prefix=f"launcher-images-{os.getpid()}-")
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._pending: dict[str, asyncio.Future[PreparedImage]] = {}
        self._kept: OrderedDict[str, PreparedImage] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.num_preprocessed = self.num_refused = 0
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once a worker is ready; gets the exception where none can be."""

    def open(self) -> None:
        """Start the workers."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._work()) for _ in range(self._num_workers)]

    async def close(self) -> None:
        """End the workers and remove the files."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._folder.cleanup)
        if self._fetcher is not None:
            await self._fetcher.close()

    async def prepare(self, urls: Sequence[str]) -> tuple[PreparedImage, ...]:
        """Return the images of data URLs, in order; call ``release`` once their request has ended.

        Raises:
            RefusedImage: one of them is not used.
            ApiError: there is no room for them now.
        """
        found: list[PreparedImage] = []
        try:
            for number, url in enumerate(urls):
                try:
                    held = url if self._fetcher is None else await self._fetcher.data_url(url)
                    found.append(await self._acquire(await asyncio.to_thread(_hash, held), held))
                except (RefusedImage, BadImage) as refused:
                    raise RefusedImage(str(refused), number) from None
        except BaseException:
            self.release(found)
            raise
        return tuple(found)

    def release(self, images: Sequence[PreparedImage]) -> None:
        """Let files go, which stay as long as there is room."""
        for each in images:
            self._users[each.image.content] -= 1
            if not self._users[each.image.content]:
                del self._users[each.image.content]
        self._evict()

    async def _acquire(self, key: str, url: str) -> PreparedImage:
        while True:
            if (kept := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                self._users[key] += 1
                return kept
            if (answer := self._pending.get(key)) is None:
                if self._jobs.qsize() >= _MAX_WAITING or self._used_bytes() >= self._cache_bytes:
                    raise ApiError(429, "too many images are in use", code="queue_full", retry_s=2)
                answer = self._pending[key] = asyncio.get_running_loop().create_future()
                answer.add_done_callback(_observe)
                self._jobs.put_nowait(_Job(key=key, url=url, answer=answer))
            await asyncio.shield(answer)  # it may be evicted before this continues, so it is looked up again

    def _used_bytes(self) -> int:
        return sum(self._kept[key].num_bytes for key in self._users)

    def _evict(self) -> None:
        total = sum(each.num_bytes for each in self._kept.values())
        for key in [key for key in self._kept if key not in self._users]:
            if total <= self._cache_bytes:
                return
            total -= self._kept[key].num_bytes
            Path(self._kept.pop(key).image.file).unlink(missing_ok=True)

    async def _work(self) -> None:
        """Give one worker after the other its jobs."""
        while True:
            try:
                async with contextlib.aclosing(_Worker(self._processor)) as worker:
                    self.processes.append(worker.process)
                    try:
                        await worker.start()
                        if not self.ready.done():
                            self.ready.set_result(None)
                        while await self._next(worker):
                            pass
                    finally:
                        self.processes.remove(worker.process)
            except NoWorker as error:
                if not self.ready.done():
                    self.ready.set_exception(
                        JobError(f"images cannot be preprocessed: {error}", exit_code=EXIT_BAD_INPUT)
                    )
                    return
                print(f"a process for images could not start: {error}", flush=True)
                await asyncio.sleep(_PAUSE_S)

    async def _next(self, worker: _Worker) -> bool:
        """Do the next job; return whether the worker is still good."""
        job = await self._jobs.get()
        file = Path(self._folder.name) / job.key
        sizes = {"max_pixels": self._limits.max_pixels, "max_bytes": self._limits.max_bytes}
        is_good = True
        try:
            async with asyncio.timeout(self._timeout_s):
                done = await worker.ask(PreprocessImage(url=job.url, file=str(file), **sizes))
        except TimeoutError:
            done, is_good = ImageRefused(why=f"the image took longer than {self._timeout_s:g} s to preprocess"), False
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            done, is_good = ImageRefused(why="the image ended the process that decodes it"), False
        except asyncio.CancelledError:
            self._pending.pop(job.key, None)
            job.answer.cancel()
            raise
        del self._pending[job.key]
        if isinstance(done, ImageDone):
            self.num_preprocessed += 1
            image = RequestImage(content=job.key, file=str(file), num_tokens=done.num_tokens)
            self._kept[job.key] = PreparedImage(image=image, text=done.text, num_bytes=done.num_bytes)
            self._evict_others(job.key)
            job.answer.set_result(self._kept[job.key])
        else:
            self.num_refused += 1
            assert isinstance(done, ImageRefused), "workers answer a job by one of both"
            job.answer.set_exception(RefusedImage(done.why))
        return is_good

    def _evict_others(self, key: str) -> None:
        """Evict files, but not the one just made, which requests take in a moment."""
        self._users[key] += 1
        self._evict()
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]


class _Worker:
    """One process, and the connection to it."""

    def __init__(self, processor: Path) -> None:
        self._local, remote = socket.socketpair()
        with remote:
            environ = {name: value for name, value in os.environ.items() if name != API_KEYS_VARIABLE}
            arguments = (str(processor), str(remote.fileno()), str(os.getpid()))
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launcher.inference.server.image_worker", *arguments],
                env={**environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[remote.fileno()],
            )
        self._local.setblocking(False)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def start(self) -> None:
        """Wait until it has loaded the processor.

        Raises:
            NoWorker: it cannot.
        """
        self._streams = await asyncio.open_connection(sock=self._local)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                said = await self._read()
        except (asyncio.IncompleteReadError, ConnectionError):
            raise NoWorker("it ended while it loaded the model's processor") from None
        except TimeoutError:
            raise NoWorker(f"it did not load the model's processor within {_START_TIMEOUT_S:g} s") from None
        if not isinstance(said, WorkerReady):
            raise NoWorker(said.why if isinstance(said, ImageRefused) else "it sent an invalid message")

    async def ask(self, job: PreprocessImage) -> ImageMessage:
        """Return its answer."""
        assert self._streams is not None, "it has started"
        self._streams[1].write(pack_image_message(job))
        await self._streams[1].drain()
        return await self._read()

    async def _read(self) -> ImageMessage:
        assert self._streams is not None, "it has started"
        (length,) = LENGTH_PREFIX.unpack(await self._streams[0].readexactly(LENGTH_PREFIX.size))
        if length > MAX_MESSAGE_BYTES:
            raise ConnectionError(f"a frame of {length} bytes")
        return unpack_image_message(await self._streams[0].readexactly(length))

    async def aclose(self) -> None:
        """End it at once."""
        if self.process.poll() is None:  # not waited for yet, so the number is still its own
            self.process.send_signal(signal.SIGKILL)
        if self._streams is not None:
            self._streams[1].close()
        else:
            self._local.close()
        await asyncio.to_thread(self.process.wait)


def _hash(url: str) -> str:
    """Return what an image is recognised by: the hash of its data URL, as it came."""
    return hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()


def _observe(answer: asyncio.Future[PreparedImage]) -> None:
    """Look at an error that no request waits for any more, or asyncio would print it."""
    if not answer.cancelled():
        answer.exception()
