"""Proxies, and whether the hubs answer. Asked at the same time, within a few seconds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from qwen3emb_launch.addresses import unknown_host
from qwen3emb_launch.doctor.report import Check, ok, unknown, warn
from qwen3emb_launch.hub import huggingface

TIMEOUT = 4.0  # seconds for each hub, name resolution included
APART = 60.0  # seconds that two clocks may differ
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
LOCAL = ("localhost", "127.0.0.1")
MODELSCOPE = "https://www.modelscope.cn"


@dataclass(frozen=True)
class Answer:
    """What a hub said: its clock's difference to ours in seconds, or why it did not answer."""

    reached: bool
    why: str = ""
    apart: float | None = None


def proxy(environ: Mapping[str, str]) -> Check:
    """A proxy without exceptions catches requests to this machine too; ours are made without it."""
    found = {name: environ.get(name) or environ.get(name.lower()) for name in PROXIES}
    used = {name: _host(value) for name, value in found.items() if value}
    if not used:
        return ok("proxy", "none")
    says = ", ".join(f"{name} is {value}" for name, value in used.items())
    exempt = (environ.get("NO_PROXY") or environ.get("no_proxy") or "").replace(" ", "").split(",")
    if "*" not in exempt and not all(host in exempt for host in LOCAL):
        return warn(
            "proxy",
            f"{says}; clients on this machine send even local requests there",
            "export NO_PROXY=localhost,127.0.0.1,::1",
        )
    return ok("proxy", says)


def hub(name: str, url: str, answer: Answer, *, chosen: bool) -> Check:
    """Whether models can be downloaded from there. `chosen`: it is asked first."""
    label = f"hub {name}"
    if answer.reached:
        return ok(label, f"{_host(url)} answers")
    other = "HF_ENDPOINT=https://… for a mirror, or: qwen3emb download --source modelscope"
    mend = other if chosen else "only needed where Hugging Face does not answer"
    return warn(label, f"{_host(url)} does not answer: {answer.why}", mend)


def clocks(answers: Mapping[str, Answer]) -> Check | None:
    """The local clock against the hubs'; None when none told its own."""
    told = {name: a.apart for name, a in answers.items() if a.apart is not None}
    if not told:
        return None
    name, apart = min(told.items(), key=lambda item: abs(item[1]))
    if abs(apart) > APART:
        way = "behind" if apart > 0 else "ahead of"
        says = f"this machine is {abs(apart):.0f} s {way} {name}"
        return warn("clock difference", says, "sudo timedatectl set-ntp true")
    return ok("clock difference", f"under {APART:.0f} s to {name}")


def checks(*, offline: bool, environ: Mapping[str, str] | None = None) -> list[Check]:
    """All of them; `offline` asks nobody."""
    env = os.environ if environ is None else environ
    found = [proxy(env)]
    hubs = {"huggingface": huggingface.endpoint(), "modelscope": env.get("MODELSCOPE_ENDPOINT") or MODELSCOPE}
    if offline or huggingface.offline():
        why = "not asked: " + ("--offline" if offline else "HF_HUB_OFFLINE is set")
        return [*found, *(unknown(f"hub {name}", why) for name in hubs)]
    answers = _ask_all(hubs)
    found += [hub(name, url, answers[name], chosen=name == "huggingface") for name, url in hubs.items()]
    difference = clocks(answers)
    return [*found, difference] if difference else found


def _ask_all(hubs: Mapping[str, str]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}

    def ask(name: str, url: str) -> None:
        answers[name] = reach(url)

    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in hubs.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + TIMEOUT + 1
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return {name: answers.get(name, Answer(False, f"no answer within {TIMEOUT:g} s")) for name in hubs}


def reach(url: str) -> Answer:
    """Ask for the headers of a hub's front page, through the proxies that a download would use."""
    import httpx

    try:
        answer = httpx.head(url, timeout=TIMEOUT)
    except httpx.HTTPError as error:
        unknown = unknown_host(error, url)
        return Answer(False, unknown.message if unknown else f"{type(error).__name__}: {error}".rstrip(": "))
    except (ValueError, OSError, httpx.InvalidURL) as error:
        return Answer(False, f"{type(error).__name__}: {error}")
    try:
        apart = parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()
    except (KeyError, ValueError, TypeError):
        apart = None
    return Answer(True, apart=apart)


def _host(url: str) -> str:
    """Scheme and host, without user and password."""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
    except ValueError:  # `http://[::1`
        return "something that is no address"
    host = parts.netloc.rsplit("@", 1)[-1]
    return f"{parts.scheme}://{host}" if parts.scheme else host
