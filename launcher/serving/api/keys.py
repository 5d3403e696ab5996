"""Keys that clients show, and how often each may ask."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from launcher.errors import ConfigError

VARIABLE = "LAUNCHER_API_KEYS"
_MOST_CALLERS = 10_000


class Keys:
    """The keys of a server, kept as hashes.

    Args:
        keys: in plain text; none at all lets everybody in.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._hashes = [_hash(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def owner(self, authorization: str) -> str | None:
        """Return what to call whoever shows this header; ``None`` where the key is none of ours.

        Every key is compared with, each in a time that does not depend on how much of it is right.
        """
        scheme, _, shown = authorization.partition(" ")
        found = _hash(shown.strip())
        known = [hmac.compare_digest(found, each) for each in self._hashes]
        return found.hex()[:16] if any(known) and scheme.lower() == "bearer" else None


def read_keys(file: str | None, environ: Mapping[str, str]) -> Keys:
    """Return the keys of a file, one a line, and of the environment, with commas between.

    Raises:
        ConfigError: the variable is set and holds no key, which must not mean that everyone is served.
    """
    for problem in variable_problems(environ):
        raise problem
    lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines() if file else []
    words = [line.strip() for line in lines if not line.lstrip().startswith("#")]
    return Keys(tuple(word for word in words if word) + _keys_of_variable(environ))


def variable_problems(environ: Mapping[str, str]) -> Iterator[ConfigError]:
    """Yield a variable of keys that is set and holds none."""
    if VARIABLE in environ and not _keys_of_variable(environ):
        why = "it is set but holds no key, so anyone could use the server"
        fix = f"write keys into it, with commas between, or type: unset {VARIABLE}"
        # not the name alone: what follows a name of keys and a colon is hidden as a secret
        yield ConfigError(f"the variable {VARIABLE} of the environment", why=why, fix=fix)


def _keys_of_variable(environ: Mapping[str, str]) -> tuple[str, ...]:
    words = re.split(r"[,\n]", environ.get(VARIABLE, ""))
    return tuple(word.strip() for word in words if word.strip())


class Rates:
    """A bucket for each caller that fills at a steady rate and holds a minute's worth.

    Args:
        per_minute: requests; ``None`` counts nobody.
        now: the clock.
    """

    def __init__(self, per_minute: int | None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._now = per_minute, now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str) -> float:
        """Take one request of ``caller``; return 0 if it may go on, else after what time it may."""
        if self._per_minute is None:
            return 0.0
        now, rate = self._now(), self._per_minute / 60.0
        left, at = self._buckets.pop(caller, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - at) * rate)
        wait_s = 0.0 if left >= 1.0 else (1.0 - left) / rate
        self._buckets[caller] = (left - (wait_s == 0.0), now)
        while len(self._buckets) > _MOST_CALLERS:
            self._buckets.popitem(last=False)
        return wait_s


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
