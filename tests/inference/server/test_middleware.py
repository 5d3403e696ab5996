"""Room for bodies: counted as they come, for each address, and not at all before a key is shown."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from launcher.inference.server.http_limits import AllowedHosts, TrustedProxies, client_network
from launcher.inference.server.middleware import AdmissionMiddleware, ApiKeys, RateLimiter
from launcher.inference.server.responses import ApiError

MAX = 1 << 20
HOST, KEY = (b"host", b"localhost"), (b"authorization", b"Bearer k")
CHUNKED = (b"transfer-encoding", b"chunked")


class Client:
    """One request whose body comes when the test says so."""

    def __init__(
        self, gate: AdmissionMiddleware, *headers: tuple[bytes, bytes], address: str = "192.0.2.1", path: str = "/x"
    ) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self.sent: list[Any] = []
        self.num_asked = 0
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "http_version": "1.1",
            "headers": [HOST, *headers],
            "client": (address, 1),
        }
        self.task = asyncio.create_task(gate(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        self.num_asked += 1
        return await self._queue.get()

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    async def give(self, size: int, *, more: bool = True) -> None:
        """Send some of the body, and let the gate look at it."""
        self._queue.put_nowait({"type": "http.request", "body": bytes(size), "more_body": more})
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def code(self) -> str | None:
        """Of the error that was answered."""
        if not self.sent:
            return None
        return str(json.loads(self.sent[-1]["body"])["error"]["code"])


async def ok(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await asyncio.Event().wait()


def gate(*keys: str, rates: RateLimiter | None = None, proxies: TrustedProxies | None = None) -> AdmissionMiddleware:
    return AdmissionMiddleware(
        ok,
        keys=ApiKeys(keys),
        hosts=AllowedHosts("127.0.0.1"),
        proxies=proxies or TrustedProxies(),
        rates=rates or RateLimiter(None),
        max_body_bytes=MAX,
        body_timeout_s=60,
        reject=lambda reason: None,
    )


def test_only_bytes_that_have_come_take_room_and_one_address_has_a_share() -> None:
    async def go() -> None:
        door = gate()
        idle = [Client(door, CHUNKED) for _ in range(500)]
        for client in idle:
            await client.give(1)
        large = [Client(door, CHUNKED) for _ in range(20)]
        for client in large:
            await client.give(MAX - 10)
        assert [client.code for client in large] == [None] * 17 + ["busy"] * 3  # the first 64 KiB of each are free
        small, other = Client(door, CHUNKED), Client(door, CHUNKED, address="192.0.2.2")
        await small.give(60_000, more=False)
        await other.give(MAX - 10)
        assert small.code is other.code is None
        for client in (*idle, *large, small, other):
            client.task.cancel()
        await asyncio.gather(*(client.task for client in (*idle, *large)), return_exceptions=True)
        again = Client(door, CHUNKED)
        await again.give(MAX - 10)
        assert again.code is None
        again.task.cancel()

    asyncio.run(go())


@pytest.mark.parametrize("path", ["/v1/completions", "/anything"])
def test_a_body_is_read_once_a_key_is_shown(path: str) -> None:
    async def go() -> None:
        door = gate("k")
        stranger, owner = Client(door, CHUNKED, path=path), Client(door, CHUNKED, KEY, path=path)
        for client in (stranger, owner):
            await client.give(1)
        assert (stranger.code, stranger.num_asked) == ("invalid_api_key", 0)
        assert (b"connection", b"close") in stranger.sent[0]["headers"]
        assert owner.num_asked > 0
        owner.task.cancel()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::1", True),
    ],
)
def test_which_addresses_are_one_client(one: str, other: str, same: bool) -> None:
    assert (client_network(one) == client_network(other)) is same


@pytest.mark.parametrize(
    ("host", "names", "allowed", "refused"),
    [
        ("127.0.0.1", (), ["localhost:1", "127.0.0.9", "[::1]"], ["192.0.2.1", "box", "localhost.example.org", ""]),
        ("0.0.0.0", (), ["192.0.2.1:80", "[2001:db8::1]", "0.0.0.0"], ["example.org", "192.0.2.1.example.org"]),
        ("::1", ("models.example.org",), ["MODELS.example.org:1", "[::1]"], ["example.org", "x.models.example.org"]),
        ("127.0.0.1", ("*",), ["example.org"], ["a b", "a/b", "user@example.org"]),
    ],
)
def test_which_names_a_server_has(host: str, names: tuple[str, ...], allowed: list[str], refused: list[str]) -> None:
    hosts = AllowedHosts(host, names)

    def problem(name: str, origin: str | None = None) -> bool:
        headers = {b"host": name.encode(), **({} if origin is None else {b"origin": origin.encode()})}
        try:
            hosts.check(headers, http_version="1.1")
        except ApiError as error:
            return error.status == 403 and "job.allowed_hosts" in error.message
        return False

    for name in allowed:
        assert not problem(name)
        assert not problem(name, f"http://{name}")
    for name in refused:
        assert problem(name)
        assert problem(allowed[0], f"http://{name}")


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.5", ["192.0.2.1"], "192.0.2.1"),
        ("::ffff:10.0.0.5", ["192.0.2.1"], "192.0.2.1"),
        ("192.0.2.9", ["192.0.2.1"], "192.0.2.9"),  # no proxy of ours: it may say what it likes
        ("10.0.0.5", ["1.1.1.1, 192.0.2.1"], "192.0.2.1"),  # the client itself sent the first one
        ("10.0.0.5", ["1.1.1.1", "192.0.2.1, 10.1.2.3"], "192.0.2.1"),  # a second proxy of ours
        ("10.0.0.5", ["192.0.2.1, nonsense"], "10.0.0.5"),
        ("10.0.0.5", ["192.0.2.0/24"], "10.0.0.5"),
        ("10.0.0.5", [""], "10.0.0.5"),
        ("10.0.0.5", [], "10.0.0.5"),
        ("10.0.0.5", ["2001:db8::7"], "2001:db8::7"),
    ],
)
def test_a_trusted_proxy_names_the_client(peer: str, forwarded: list[str], client: str) -> None:
    proxies = TrustedProxies(["10.0.0.5", "10.1.0.0/16"])
    headers = [(b"x-forwarded-for", each.encode()) for each in forwarded]
    assert proxies.client(peer, headers) == client
    assert TrustedProxies().client(peer, headers) == peer


def test_clients_of_a_trusted_proxy_have_rates_of_their_own() -> None:
    async def code(door: AdmissionMiddleware, client: str) -> str | None:
        asked = Client(door, (b"x-forwarded-for", client.encode()), address="10.0.0.5")
        await asked.give(0, more=False)
        asked.task.cancel()
        return asked.code

    async def go() -> None:
        for networks, expected in (
            (["10.0.0.5"], [None, None, "rate_limit_exceeded"]),
            ([], [None, *2 * ["rate_limit_exceeded"]]),
        ):
            door = gate(rates=RateLimiter(1), proxies=TrustedProxies(networks))
            assert [await code(door, client) for client in ("192.0.2.1", "192.0.2.2", "192.0.2.1")] == expected

    asyncio.run(go())
