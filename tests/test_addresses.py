"""Addresses: what is none, and host names that nobody knows, from every command that takes an address."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from qwen3emb_launch.addresses import unknown_host, web_address
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.client import AsyncClient, Client
from qwen3emb_launch.errors import NetworkError
from qwen3emb_launch.gateway.http_client import Address
from qwen3emb_launch.gateway.upstream import UpstreamPool, UpstreamState
from tests.test_gateway_resilience import run as run_loop
from tests.test_gateway_resilience import until

URL = "http://no-such-host.invalid/v1"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that knows no name, as of a machine that can ask its name server."""

    def nobody(host: object, *_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("http://h:1/v1", "h"),
        (" https://api.example.com./v1 ", "api.example.com."),
        ("http://[::1]:8000", "::1"),
        ("http://under_score/v1", "under_score"),
        ("http://bücher.example/v1", "bücher.example"),
        ("http://a..b/v1", None),
        ("http://🫠.example/v1", None),  # no letters of the later IDNA, by which httpx goes
        ("http://.a/v1", None),
        (f"http://{64 * 'a'}.com/v1", None),
        ("http://ä..b/v1", None),
        ("http://[::1", None),
        ("http://h:x", None),
        ("http://a b", None),
        ("ftp://h", None),
    ],
)
def test_what_is_an_address(text: str, host: str | None) -> None:
    """A name that no resolver could be asked for is no address, instead of a UnicodeError later."""
    parts = web_address(text)
    assert (parts and parts.hostname) == host


@pytest.mark.parametrize("command", [["verify"], ["bench"], ["embed", "a text"]], ids=lambda words: words[0])
def test_a_name_that_does_not_resolve(command: list[str], resolver: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command says that it is the name, exits 5 and names what asks for it; nobody is accused of not answering."""
    assert run([*command, "--base-url", URL, "--json"]) == 5
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["code"] == "unknown_host"
    assert "no-such-host.invalid does not resolve" in error["message"]
    assert "getent hosts no-such-host.invalid" in error["hint"]


def test_the_clients_say_it_too(resolver: None) -> None:
    """From Python, in both kinds."""
    with pytest.raises(NetworkError) as told, Client(URL) as client:
        client.embed("a text")
    assert told.value.code == "unknown_host"

    async def main() -> None:
        async with AsyncClient(URL) as client:
            await client.embed("a text")

    with pytest.raises(NetworkError) as told:
        asyncio.run(main())
    assert told.value.code == "unknown_host"


def test_the_gateway_says_it_of_its_upstream(resolver: None) -> None:
    """The upstream stays down and is asked for again: a name may come to be known."""

    async def main() -> None:
        pool = UpstreamPool(model="null")
        upstream = pool.add(Address.parse(URL))
        await until(lambda: "no-such-host.invalid does not resolve" in upstream.reason)
        assert upstream.state is UpstreamState.DOWN
        assert upstream.prober is not None
        assert not upstream.prober.done()
        pool.close()

    run_loop(main())


def resolving_fails(number: int) -> Exception:
    """What a client raises that has wrapped the resolver's error twice."""
    inner, outer = ConnectionError("all attempts failed"), RuntimeError("no connection")
    inner.__cause__ = socket.gaierror(number, "the resolver's words")
    outer.__context__ = inner
    return outer


@pytest.mark.parametrize(
    ("environ", "proxies", "name"),
    [
        ({}, True, "host name no-such-host.invalid"),
        ({"http_proxy": "http://proxy.corp:3128"}, True, "proxy name proxy.corp"),
        ({"all_proxy": "socks5://user:secret@proxy.corp:1080"}, True, "proxy name proxy.corp"),
        ({"http_proxy": "proxy.corp:3128"}, True, "proxy name proxy.corp"),
        ({"http_proxy": "http://proxy.corp:3128"}, False, "host name no-such-host.invalid"),
        ({"https_proxy": "http://proxy.corp:3128"}, True, "host name no-such-host.invalid"),
        ({"http_proxy": "http://proxy.corp:3128", "no_proxy": ".invalid"}, True, "host name no-such-host.invalid"),
    ],
)
def test_the_name_is_the_proxys_where_one_is_asked(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], proxies: bool, name: str
) -> None:
    """Behind a proxy the endpoint's own name is resolved elsewhere."""
    for variable in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    error = unknown_host(resolving_fails(socket.EAI_NONAME), URL, proxies=proxies)
    assert error is not None
    assert f"the {name} does not resolve: the resolver's words" in error.message
    assert "secret" not in error.message + error.hint


def test_other_failures_are_not_names() -> None:
    """A refused connection is none; a name server that is silent has its own next step."""
    assert unknown_host(ConnectionRefusedError(111, "Connection refused"), URL) is None
    retried = OSError("as it was raised before")
    retried.__cause__ = retried
    assert unknown_host(retried, URL) is None
    silent = unknown_host(resolving_fails(socket.EAI_AGAIN), URL, proxies=False)
    assert silent is not None
    assert "/etc/resolv.conf" in silent.hint
