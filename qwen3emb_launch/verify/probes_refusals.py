"""Checks of what must be refused, how it is refused, and that the server lives on."""

from __future__ import annotations

import uuid

from qwen3emb_launch.vectors import distance, has_direction
from qwen3emb_launch.verify.contact import Reply
from qwen3emb_launch.verify.noise import let_noise_pass
from qwen3emb_launch.verify.probes_vectors import NO_DIRECTION
from qwen3emb_launch.verify.report import Outcome, broken, held, skipped
from qwen3emb_launch.verify.session import Probe, Session
from qwen3emb_launch.verify.texts import BASE


# Body, what it is, and whether every OpenAI-compatible server must refuse it (else only our gateway must).
def _refusals(session: Session) -> list[tuple[str, object, bool]]:
    model, width = session.contact.model, session.width
    return [
        ("an empty list", {"model": model, "input": []}, True),
        ("a number as input", {"model": model, "input": 5}, True),
        ("an object as input", {"model": model, "input": {"text": "a"}}, True),
        ("no input", {"model": model}, True),
        ("strings and numbers mixed", {"model": model, "input": ["a", 5]}, True),
        ("null in a list", {"model": model, "input": ["a", None]}, True),
        ("broken JSON", b'{"model": "m", "input": ', True),
        ("dimensions 0", {"model": model, "input": "a", "dimensions": 0}, True),
        ("dimensions -1", {"model": model, "input": "a", "dimensions": -1}, True),
        ("more dimensions than there are", {"model": model, "input": "a", "dimensions": width + 1}, True),
        ("dimensions that are a word", {"model": model, "input": "a", "dimensions": "many"}, True),
        ("a blank text", {"model": model, "input": " "}, False),
        ("a blank text in a batch", {"model": model, "input": ["a", ""]}, False),
        ("an unknown model", {"model": f"no-such-model-{uuid.uuid4().hex[:6]}", "input": "a"}, False),
        ("an unknown encoding", {"model": model, "input": "a", "encoding_format": "runes"}, False),
    ]


def probe_refusals(session: Session) -> Outcome:
    expected = "bad requests are answered 4xx"
    taken: list[str] = []
    tolerated: list[str] = []
    crashed: list[str] = []
    cases = _refusals(session)
    for what, body, must in cases:
        reply = session.contact.post("embeddings", body)
        if reply.status >= 500:
            crashed.append(f"{what}: {reply.status}")
        elif reply.status < 400:
            (taken if must or session.strict else tolerated).append(what)
    if crashed:
        return broken(
            expected, "; ".join(crashed), "bad input reaches code that fails on it: a 5xx tells clients to retry"
        )
    if taken:
        return broken(expected, f"answered with 200: {', '.join(taken)}", "bad input is silently accepted")
    if tolerated:
        return broken(
            expected,
            f"answered with 200: {', '.join(tolerated)}",
            "a bare engine does not check these; qwen3emb's gateway does",
            advisory=True,
        )
    return held(expected, f"{len(cases)} kinds of bad request refused")


def probe_error_form(session: Session) -> Outcome:
    expected = 'errors as OpenAI sends them: {"error": {"message", "type", "code"}}, without server paths'
    replies = [session.contact.post("embeddings", body) for _, body, _ in _refusals(session)]
    replies = [r for r in replies if r.status >= 400]
    flat = [r for r in replies if not _nested(r)]
    leaking = [r for r in replies if 'File "/' in r.text or 'File \\"/' in r.text or "Traceback" in r.text]
    if not flat and not leaking:
        return held(expected, f"{len(replies)} errors")
    seen = [f"{len(flat)} of {len(replies)} errors in another form"] if flat else []
    seen += [f"{len(leaking)} with server file paths"] if leaking else []
    return broken(
        expected,
        ", ".join(seen),
        "a bare engine's own error form; clients see no message. qwen3emb's gateway rewrites it",
        advisory=not session.strict,
    )


def _nested(reply: Reply) -> bool:
    error = reply.data.get("error") if isinstance(reply.data, dict) else None
    return isinstance(error, dict) and isinstance(error.get("message"), str)


def probe_healthy(session: Session) -> Outcome:
    expected = "the server is as it was after bad requests"
    if not all(map(has_direction, session.base)):
        return skipped(NO_DIRECTION)
    again = session.together(BASE)
    allowed = session.precision.distance
    apart = [distance(a, b) for a, b in zip(again, session.base, strict=True)]
    if max(apart) <= allowed:
        return held(expected, f"same vectors, 1 - cosine {max(apart):.1e}")
    found = broken(expected, f"1 - cosine {max(apart):.2g}", "bad requests leave something behind in the server")
    return let_noise_pass(session, found, [(t, v) for t, v, d in zip(BASE, again, apart, strict=True) if d > allowed])


PROBES = (
    Probe("refusals", "bad requests are refused", probe_refusals, level="full"),
    Probe("error_form", "errors in OpenAI's form", probe_error_form, level="full"),
    Probe("healthy", "healthy after bad requests", probe_healthy, level="full"),
)
