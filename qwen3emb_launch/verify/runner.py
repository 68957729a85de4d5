"""The probes of a level, in order, against one endpoint."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

from qwen3emb_launch import __version__
from qwen3emb_launch.errors import InvalidInputError, NetworkError, UnfitError, nearest
from qwen3emb_launch.verify import probes_refusals, probes_requests, probes_run, probes_texts, probes_vectors, texts
from qwen3emb_launch.verify.contact import Contact, Misanswer
from qwen3emb_launch.verify.fingerprint import fingerprint
from qwen3emb_launch.verify.identity import Identity, ask_identity, from_checkpoint
from qwen3emb_launch.verify.probes_reference import (
    Compute,
    recognised_probe,
    saved_probe,
    shipped_probe,
    transformers_probe,
)
from qwen3emb_launch.verify.reference import ReferenceSet, Transformers, demo_set, transformers_reference
from qwen3emb_launch.verify.report import Check, Outcome, Report, Verdict, broken, skipped
from qwen3emb_launch.verify.session import Options, Probe, Session
from qwen3emb_launch.verify.tolerance import Precision
from qwen3emb_launch.verify.yardstick import EXACT, QUANTISED
from qwen3emb_launch.weights import weights_sample, weights_sha256

Step = Callable[[str], None]
GIVE_UP = 3  # requests without any answer in a row, until the rest is not asked


class Later:
    """A value that a thread computes from `begin` on, and whoever asks for it first where nobody began.

    The thread is no reason to stay: an interrupted program ends without it.
    """

    def __init__(self, compute: Callable[[], str | None]) -> None:
        self._future: Future[str | None] = Future()
        self._compute = compute
        self._begun = False

    def begin(self) -> None:
        """Start, once."""
        if not self._begun:
            self._begun = True
            Thread(target=self._run, daemon=True, name="hash").start()

    def value(self) -> str | None:
        """The value, waited for."""
        self.begin()
        return self._future.result()

    def _run(self) -> None:
        try:
            self._future.set_result(self._compute())
        except Exception as exc:  # noqa: BLE001 - raised again where the value is asked for
            self._future.set_exception(exc)


@dataclass(frozen=True)
class Request:
    """Everything a verification needs. `known` holds what an instance's plan says beyond the server's own words.

    `python` is the engine environment's, for the transformers comparison (None: left out), `folder` the checkpoint
    when the endpoint does not say where it lies, `memory` the file that keeps hashes of weights. `computed` is what
    the reference script answers for `texts.REFERENCE`, where the caller has it already.
    """

    base_url: str
    options: Options
    memory: Path
    model: str | None = None
    api_key: str | None = None
    dtype: str | None = None
    timeout: float = 60.0
    known: dict[str, Any] | None = None
    python: Path | None = None
    folder: Path | None = None
    device: str = "cpu"
    reference: ReferenceSet | None = None
    computed: Transformers | None = None
    keep_vectors: bool = False
    only: frozenset[str] = frozenset()


def silent(_: str) -> None:
    """Nobody watches."""


def open_session(request: Request) -> Session:
    """First contact. Raises NetworkError when nothing answers."""
    contact = Contact(request.base_url, request.api_key, request.timeout)
    try:
        identity = ask_identity(contact, request.model)
    except BaseException:
        contact.close()
        raise
    identity = replace(identity, **(request.known or {}))
    if request.folder:
        identity = replace(identity, **from_checkpoint(request.folder, identity))
    return Session(contact, identity, identity.precision(request.dtype), request.options)


def verify(request: Request, step: Step = silent) -> tuple[Report, ReferenceSet | None]:
    """Ask everything. With `keep_vectors`, an endpoint that passes also gives its vectors, as a set to save.

    Raises NetworkError when the endpoint cannot be reached at all; whatever happens later is a check's verdict.
    """
    began = time.monotonic()
    session = open_session(request)
    level = request.options.level
    hashing = _hashing(request, session)
    try:
        checks = _run(_probes(request, session, hashing), session, step)
        width = len(next(iter(session.singles.values()), ())) or None
        report = Report(
            endpoint=session.contact.base_url,
            model=session.contact.model,
            level=level,
            checks=tuple(checks),
            fingerprint=_fingerprint(request, session, width, hashing),
            width=width,
            precision=str(session.precision),
            seconds=time.monotonic() - began,
            requests=session.contact.tally.asked,
            tool=f"qwen3emb {__version__}",
            at=now(),
            environment={
                "engine": session.identity.engine,
                "engine_version": session.identity.engine_version,
                "device": session.identity.device,
                "context_length": session.context_length,
                "allowed_distance": session.precision.distance,
                "client": f"Python {platform.python_version()} {platform.machine()}",
            },
        )
        kept = _vectors_of(session, report) if request.keep_vectors and report.passed else None
    finally:
        session.contact.close()
    return report, kept


def _hashing(request: Request, session: Session) -> Later | None:
    """The whole checkpoint's hash, which only the full level reads: about a second a gigabyte."""
    folder = session.identity.folder
    if folder is None or request.options.level != "full" or request.only:
        return None
    return Later(lambda: weights_sha256(folder, request.memory))


def _fingerprint(request: Request, session: Session, width: int | None, hashing: Later | None = None) -> dict[str, Any]:
    """Of the endpoint as it is known."""
    folder = session.identity.folder
    sample = weights_sample(folder) if folder else None
    remembered = weights_sha256(folder, request.memory, read=False) if folder and not hashing else None
    sha256 = hashing.value() if hashing else remembered
    return fingerprint(session.identity, session.precision, width, sample, sha256)


def introduce(request: Request) -> tuple[Identity, dict[str, Any]]:
    """What an endpoint says it is, and its fingerprint; one text is asked, for the width. Nothing is judged.

    Raises NetworkError when it cannot be reached, and Misanswer when it does not answer.
    """
    session = open_session(request)
    try:
        return session.identity, _fingerprint(request, session, session.width)
    finally:
        session.contact.close()


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _probes(request: Request, session: Session, hashing: Later | None) -> list[Probe]:
    found = [*probes_requests.EARLY, *probes_vectors.PROBES, *probes_texts.PROBES]
    found += [*probes_requests.PROBES, *probes_refusals.PROBES]
    if request.reference is not None:
        found.append(saved_probe(request.reference))
    identity = session.identity
    shipped = demo_set(identity.folder) if identity.demo and identity.folder else None
    compute = _compute(request, identity, session.precision, hashing)
    if shipped is not None:
        found.append(shipped_probe(shipped, compute))
    elif identity.folder is None and identity.catalog is None:
        found.append(recognised_probe())
    found.append(_transformers(request, identity, compute))
    found += probes_run.LAST
    if request.only:
        return _only(found, request.only)
    wanted = {"openai"} if request.options.openai_client else set()
    return [p for p in found if p.level == "quick" or request.options.level == "full" or p.id in wanted]


def _only(found: Sequence[Probe], wanted: frozenset[str]) -> list[Probe]:
    """The named probes, whatever their level, and the first, without which nothing can be asked."""
    known = [p.id for p in found]
    for name in sorted(wanted):
        if name not in known:
            guess = nearest(name, known)
            raise InvalidInputError(
                "unknown_check",
                f"no check {name!r}; there are {', '.join(known)}",
                f"did you mean {guess!r}?" if guess else "--only ID, repeatable",
            )
    return [p for i, p in enumerate(found) if i == 0 or p.id in wanted]


def _compute(request: Request, identity: Identity, precision: Precision, hashing: Later | None) -> Compute | None:
    """The reference script on these texts, the wrong ways in a dtype where asked; None without checkpoint or python.

    For an endpoint that quantises to float8 the script does that too, so that its effect is known and not guessed.
    Nothing else waits for it or is timed, so the checkpoint is hashed beside it.
    """
    folder, python = identity.folder, request.python
    if folder is None or python is None:
        return None

    def compute(some: Sequence[str], wrong_in: str | None) -> Transformers:
        if hashing:
            hashing.begin()
        if wrong_in is None and request.computed is not None:
            return request.computed
        quantised = (QUANTISED,) if precision.quantised == QUANTISED else ()
        dtypes = (wrong_in,) if wrong_in else (*EXACT, *quantised)
        return transformers_reference(
            python, folder, some, dtypes=dtypes, device=request.device, alternatives=wrong_in is not None
        )

    return compute


def _transformers(request: Request, identity: Identity, compute: Compute | None) -> Probe:
    if compute is not None:
        return transformers_probe(compute, texts.REFERENCE)
    why = (
        "the checkpoint is not on this machine; --checkpoint FOLDER"
        if identity.folder is None
        else "no engine environment to run transformers in; `qwen3emb engine install cpu`, or --engine-python"
    )
    return Probe("transformers", "transformers' vectors", lambda _: skipped(why), level="full")


def _run(probes: Sequence[Probe], session: Session, step: Step) -> list[Check]:
    checks: list[Check] = []
    stopped: Outcome | None = None
    for at, probe in enumerate(probes):
        step(probe.title)
        began, asked = time.monotonic(), session.contact.tally.asked
        outcome = stopped if stopped and probe not in probes_run.LAST else _ask(probe, session)
        seconds, requests = time.monotonic() - began, session.contact.tally.asked - asked
        if outcome.holds is not None or not probe.quiet:
            checks.append(replace(_check(probe, outcome), seconds=seconds, requests=requests))
        if at == 0 and outcome.holds is False:  # nothing answers: the rest has nothing to look at
            stopped = skipped("the endpoint does not answer a plain request")
        elif session.contact.unanswered >= GIVE_UP:
            stopped = skipped(f"{session.contact.unanswered} requests in a row got no answer: stopped asking")
    return checks


def _ask(probe: Probe, session: Session) -> Outcome:
    try:
        return probe.run(session)
    except Misanswer as exc:
        return broken("a well-formed request is answered", exc.message, exc.cause)
    except NetworkError as exc:
        return broken("the endpoint answers", exc.message, "the server closed the connection, hangs or is gone")
    except UnfitError as exc:
        return skipped(f"{exc.message}; {exc.hint}")


def _check(probe: Probe, outcome: Outcome) -> Check:
    required = probe.required and not outcome.advisory
    verdict = (
        Verdict.SKIP
        if outcome.holds is None
        else Verdict.PASS
        if outcome.holds
        else Verdict.FAIL
        if required
        else Verdict.WARN
    )
    return Check(
        probe.id, probe.title, required, verdict, outcome.expected, outcome.seen, outcome.cause, outcome.figures
    )


def _vectors_of(session: Session, report: Report) -> ReferenceSet:
    """The endpoint's own vectors of all texts, to hold a later deployment to, and for `diff`."""
    return ReferenceSet(
        origin=f"{report.endpoint} on {report.at}",
        dtype=session.precision.dtype,
        vectors=session.fitting(texts.ALL),
        model=report.model,
        fingerprint=report.fingerprint,
        at=report.at,
    )


def vectors_for_diff(request: Request, wanted: Sequence[str] = texts.ALL) -> tuple[ReferenceSet, Precision]:
    """The endpoint's vectors of these texts and its fingerprint, without judging it.

    Raises NetworkError when it cannot be reached, and Misanswer when it does not answer.
    """
    session = open_session(request)
    try:
        vectors = session.fitting(wanted)
        found = ReferenceSet(
            origin=f"{session.contact.base_url} ({session.identity.model})",
            dtype=session.precision.dtype,
            vectors=vectors,
            model=session.identity.model,
            fingerprint=_fingerprint(request, session, len(next(iter(vectors.values())))),
            at=now(),
        )
        return found, session.precision
    finally:
        session.contact.close()
