"""Checks of the whole run, asked last: they send nothing, they judge what all requests came to."""

from __future__ import annotations

import math

from qwen3emb_launch.vectors import norm
from qwen3emb_launch.verify.probes_vectors import OVERFLOW, quoted
from qwen3emb_launch.verify.report import Outcome, broken, held, skipped
from qwen3emb_launch.verify.session import Probe, Session
from qwen3emb_launch.verify.tally import Length, Shape

WHERE = {  # which requests, by what they have in common
    "base64": "in base64",
    "long": "for long texts",
    "dims": "where fewer dims are asked",
    "batch": "in batches",
    "busy": "under load",
}


def probe_throughout(session: Session) -> Outcome:
    """What a check compares by direction says nothing of lengths, and no check looks at the index of every answer."""
    tally = session.contact.tally
    allowed = session.precision.norm
    expected = f"every answer: finite, length 1 ± {allowed:.2g}, index 0, 1, 2 …"
    off = {s: found for s, found in tally.lengths.items() if found.off > _allowed(session, s)}
    plain = session.singles.values()
    if off and plain and not any(abs(norm(v) - 1) <= allowed for v in plain):
        return skipped("no vector has length 1: see `norm`")
    if off:
        worst = max(off.values(), key=lambda found: found.off)
        return broken(expected, _seen(worst), _where(off, worst))
    if tally.misnumbered:
        return broken(
            expected,
            f"index {tally.misnumbered}",
            "the index fields are wrong: clients that sort by them mix texts up",
        )
    return held(expected, f"{tally.asked} requests")


def _allowed(session: Session, shape: Shape) -> float:
    """Errors of single components average out less where there are few of them."""
    return max(session.precision.norm, 2.05 * session.precision.roundoff if shape.dims else 0.0)


def _seen(worst: Length) -> str:
    what = "a zero vector" if worst.length == 0 else f"length {worst.length:.3f}"
    return f"{what if math.isfinite(worst.length) else 'NaN, null or infinity'} for {quoted(worst.text)}"


def _where(off: dict[Shape, Length], worst: Length) -> str:
    if worst.off == math.inf:
        return "some texts get a zero vector" if worst.length == 0 else f"overflow on some texts: {OVERFLOW}"
    common = [words for trait, words in WHERE.items() if all(trait in s.traits for s in off)]
    return f"no L2 normalisation {' '.join(common)}" if common else "some answers are not normalised"


def probe_model_name(session: Session) -> Outcome:
    """Who falls back to another model often says so."""
    tally, names = session.contact.tally, session.identity.names
    expected = f"answers name the model that was asked, {session.contact.model!r}"
    if not tally.models:
        return skipped("answers name no model")
    told = session.identity.engine_version is not None  # by a route that also tells the model's path
    foreign = {
        name: n
        for name, n in tally.models.items()
        if not any(_alike(name, known) for known in names) and (told or not name.startswith("/"))
    }
    if not foreign:
        return held(expected, ", ".join(map(repr, tally.models)))
    name = max(foreign, key=foreign.__getitem__)
    promised = session.strict or (session.identity.engine == "sglang" and told)
    return broken(
        expected,
        f"{name!r} in {foreign[name]} of {sum(tally.models.values())} answers",
        "another model may have answered: a proxy that falls back, or a name that was configured wrong",
        advisory=not promised,
    )


def _alike(name: str, known: str) -> bool:
    """Whether two names may be of one model: an owner, a folder or a version more or less."""
    a, b = (n.strip("/").rpartition("/")[2].lower() for n in (name, known))
    return bool(a and b) and (a in b or b in a)


def probe_reliable(session: Session) -> Outcome:
    """No well-formed request of the whole run may have failed."""
    tally = session.contact.tally
    expected = "every well-formed request is answered"
    if not tally.failures:
        return held(expected, f"{tally.asked} of {tally.asked}")
    share = len(tally.failures) / tally.asked
    often = (
        "most requests fail" if share > 0.6 else f"an intermittent fault: about one request in {round(1 / share)} fails"
    )
    seen = f"{len(tally.failures)} of {tally.asked} failed, first {tally.failures[0]}"
    return broken(expected, seen, often)


LAST = (
    Probe("throughout", "every answer of the run", probe_throughout),
    Probe("model_name", "the model's name", probe_model_name),
    Probe("reliable", "no request fails", probe_reliable),
)
