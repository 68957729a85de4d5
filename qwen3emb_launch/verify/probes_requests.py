"""Checks of the interface: encodings, token ids, usage, repetition, load, latency, refusals."""

from __future__ import annotations

import random
import statistics
import time
import uuid
from itertools import pairwise

from qwen3emb_launch.demo_model import EOS_ID
from qwen3emb_launch.errors import NetworkError
from qwen3emb_launch.vectors import distance, finite, has_direction, sliced
from qwen3emb_launch.verify.contact import Misanswer
from qwen3emb_launch.verify.noise import let_noise_pass
from qwen3emb_launch.verify.probes_vectors import (
    NO_DIRECTION,
    ONE_FOR_ALL,
    SAME,
    byte_storage,
    one_for_all,
    quoted,
)
from qwen3emb_launch.verify.recognition import serves_demo
from qwen3emb_launch.verify.report import Outcome, broken, held, skipped
from qwen3emb_launch.verify.session import DEFAULT_MAX_LATENCY, Probe, Session, Vector
from qwen3emb_launch.verify.texts import BASE, DOCUMENTS, EMOJI, MIXED, ONE_TOKEN, QUERIES, long_text

# Token ids of `Hello, world!` by the official tokenizer, for an endpoint that has no /tokenize.
HELLO = "Hello, world!"
HELLO_IDS = (9707, 11, 1879, 0)
LONG_TOKENS, LONG_TEXTS = 2_000, 4  # together more than engines capture graphs for (4,224 by this launcher's plans)
SAMPLE = 100  # words by whose tokens others are reckoned
LONG_SECONDS = 3.0  # for one of them: a CPU would work on all for minutes
LARGE = 100  # texts in the largest batch that is asked; many servers compute 32 at a time
MISCOUNTED = "usage counts something else than the tokens of the text, or more is embedded than was sent"
FRAMED = 4  # tokens of one letter with the marks that any model puts around it


def probe_answers(session: Session) -> Outcome:
    answer = session.contact.embed(BASE[0])
    session.keep(BASE[0], answer)
    seen = f"{session.width} dims from {session.contact.model!r}, the first after {answer.seconds:.2f} s"
    return held("an OpenAI-compatible embeddings route", seen)


def probe_steady(session: Session) -> Outcome:
    """Many requests, several at a time, each text several times: noise, rare faults and cross-talk."""
    full = session.options.level == "full"
    rounds, threads = (12, 16) if full else (3, 8)
    allowed = session.precision.distance
    expected = f"the same text, the same vector: 1 - cosine ≤ {allowed:.1e}"
    usable = [t for t, v in zip(BASE, session.base, strict=True) if has_direction(v)]
    if not usable:
        return skipped(NO_DIRECTION)
    asked = usable * rounds
    random.Random(len(asked)).shuffle(asked)  # noqa: S311 - an order, not a secret

    def again(text: str) -> tuple[str, Vector, float | None, str]:
        try:
            vector = session.contact.embed(text).vectors[0]
        except Misanswer as exc:
            return text, (), None, exc.message
        away = distance(vector, session.vector(text))
        other = next(
            (o for o in usable if away > allowed and o != text and distance(vector, session.vector(o)) <= allowed), ""
        )
        return text, vector if away > allowed else (), away, other

    seen = session.parallel(again, asked, threads)
    failed = [message for _, _, away, message in seen if away is None]
    wrong = [(text, vector, other) for text, vector, away, other in seen if away is not None and away > allowed]
    worst = max((away for _, _, away, _ in seen if away is not None), default=0.0)
    if not failed and not wrong:
        return held(expected, f"{len(asked)} requests, {threads} at a time: {worst:.1e} at most", worst=worst)
    if failed and not wrong:
        return broken(expected, _rate(len(failed), len(asked), "failed") + f": {failed[0]}", _rare(failed, asked))
    parts = [_rate(len(wrong), len(asked), "differ") + f", up to {worst:.2g}"]
    parts += [_rate(len(failed), len(asked), "failed")] if failed else []
    if all(other for _, _, other in wrong):
        text, _, other = wrong[0]
        cause = f"cross-talk: {quoted(text)} got the vector of {quoted(other)}"
    elif len(wrong) > 0.6 * len(asked):
        cause = "noise: no two answers for one text agree within the precision"
    else:
        cause = f"an intermittent fault: about one answer in {round(len(asked) / len(wrong))} is another vector"
    found = broken(expected, "; ".join(parts), cause, worst=worst)
    return found if failed else let_noise_pass(session, found, [(text, vector) for text, vector, _ in wrong])


def _rate(count: int, of: int, what: str) -> str:
    return f"{count} of {of} {what}"


def _rare(failed: list[str], asked: list[str]) -> str:
    every = round(len(asked) / len(failed))
    return "every request fails" if every <= 1 else f"an intermittent fault: about one request in {every} fails"


def probe_latency(session: Session) -> Outcome:
    """Median of single short texts, unique so that no cache answers, one client."""
    given = session.options.max_latency
    limit = DEFAULT_MAX_LATENCY if given is None else given
    count = 15 if session.options.level == "full" else 5
    tag = uuid.uuid4().hex[:8]
    took = sorted(1000 * session.contact.embed(f"Latency of text {tag} {i}").seconds for i in range(count))
    median = statistics.median(took)
    expected = f"one short text within {limit:g} ms (median)"
    seen = f"{median:.1f} ms ({took[0]:.1f} to {took[-1]:.1f}, {count} texts)"
    if median <= limit:
        return held(expected, seen, median_ms=median, limit_ms=limit)
    on_cpu = session.identity.device == "cpu"
    return broken(
        expected,
        seen,
        "slow: the engine runs on a CPU"
        if on_cpu
        else "slow: a busy GPU, a far endpoint, or a launch without CUDA graphs",
        advisory=on_cpu and given is None,
        median_ms=median,
        limit_ms=limit,
    )


def probe_base64(session: Session) -> Outcome:
    expected = "base64 carries the same numbers as float"
    answer = session.contact.embed(DOCUMENTS[0], encoding="base64")
    if not answer.base64:
        return broken(
            expected,
            "floats, although base64 was asked",
            "encoding_format is ignored (SGLang up to 0.5.16 does): the Python client copes, OpenAI's Node client "
            "misreads it as a vector of a quarter of the length; qwen3emb's gateway and plugin answer base64",
            advisory=not session.strict,
        )
    whole = session.vector(DOCUMENTS[0])
    apart = distance(answer.vectors[0], whole)
    if len(answer.vectors[0]) != len(whole):
        return broken(expected, f"{len(answer.vectors[0])} numbers, not {len(whole)}", "base64 is not of float32")
    if apart > session.precision.distance:
        cause = "base64 is not little-endian float32, or of another vector"
        return let_noise_pass(
            session, broken(expected, f"1 - cosine {apart:.2g}", cause), [(DOCUMENTS[0], answer.vectors[0])]
        )
    if byte_storage(answer.vectors[0]) and not byte_storage(whole):
        return broken(expected, "a byte a component", "base64 is of a coarser number format")
    return _base64_batch(session, expected) or held(expected, f"{len(whole)} float32, 1 - cosine {apart:.1e}")


def _base64_batch(session: Session, expected: str) -> Outcome | None:
    """What OpenAI's clients send: several texts, fewer dims, base64. None where it is answered right."""
    texts = [QUERIES[0], DOCUMENTS[1]]
    dims = min(128, session.width)
    vectors = session.contact.embed(texts, dims=dims, encoding="base64").vectors
    if any(len(v) != dims for v in vectors):
        return broken(expected, f"{len(vectors[0])} numbers for {dims} asked", "`dimensions` is ignored in base64")
    # Another batch, and less to average the errors over than in the full vector.
    allowed = session.precision.distance * max(1.0, session.width / dims)
    apart = [distance(v, sliced(session.vector(t), dims)) for t, v in zip(texts, vectors, strict=True)]
    if max(apart) <= allowed:
        return None
    found = broken(
        expected, f"1 - cosine {max(apart):.2g} in a batch", "base64 in batches is of another text or vector"
    )
    return let_noise_pass(session, found, list(zip(texts, vectors, strict=True)), fewer_dims=True)


def probe_openai(session: Session) -> Outcome:
    expected = "the official OpenAI client gets the same vector"
    vector = session.contact.openai_vector(DOCUMENTS[1])
    whole = session.vector(DOCUMENTS[1])
    apart = distance(vector, whole)
    if apart <= session.precision.distance:
        return held(expected, f"{len(vector)} dims, 1 - cosine {apart:.1e}")
    found = broken(
        expected, f"{len(vector)} dims, 1 - cosine {apart:.2g}", "the client's default request is misanswered"
    )
    return let_noise_pass(session, found, [(DOCUMENTS[1], vector)])  # a gateway's cache may hold a batch's


def probe_usage(session: Session) -> Outcome:
    expected = "usage counts the tokens, EOS included, and adds up over a batch"
    texts = [ONE_TOKEN, QUERIES[0], DOCUMENTS[1]]
    session.vectors(texts)
    alone = [session.tokens[t] for t in texts]
    answer = session.contact.embed(texts)
    together = answer.tokens
    seen = f"{alone} alone, {together} together"
    if together is None or any(n is None for n in alone):
        return broken(expected, "no usage.prompt_tokens", "usage is missing", advisory=not session.strict)
    counts = [n for n in alone if n is not None]
    if not any(counts) and not together:
        return broken(expected, seen, "usage is always 0", advisory=not session.strict)
    if answer.total not in (None, together):
        return broken(expected, f"{answer.total} total_tokens, {together} prompt_tokens", "usage contradicts itself")
    if sum(counts) != together or not 0 < counts[0] < counts[1] < counts[2]:
        return broken(expected, seen, "usage does not count tokens, or texts are cut")
    known, source = _ids_of(session)
    session.vector(HELLO)
    said = session.tokens[HELLO]
    if known and said is not None and abs(said - len(known)) > 1:  # EOS may be left out of the count
        return broken(expected, f"{said} for a text of {len(known)} tokens ({source})", MISCOUNTED)
    if counts[0] == 1:
        return broken(
            expected, seen, "one letter counts one token: <|endoftext|> is not appended, or not counted", advisory=True
        )
    if counts[0] > FRAMED:
        return broken(
            expected, seen, "one letter counts many tokens: a prefix or an instruction is added to texts", advisory=True
        )
    return held(expected, seen)


def probe_token_ids(session: Session) -> Outcome:
    expected = "token ids with <|endoftext|> at the end = the text"
    ids, source = _ids_of(session)
    if not ids:
        return skipped("no /tokenize route and not the official tokenizer: the ids of a text are not known here")
    eos = ids[-1]
    bare = list(ids[:-1])
    text = session.vector(HELLO)
    try:
        with_eos = session.contact.embed([*bare, eos]).vectors[0]
    except Misanswer as exc:
        return broken(expected, exc.message, "token ids are not taken", advisory=not session.strict)
    allowed = session.precision.distance
    apart = distance(with_eos, text)
    if apart <= allowed:
        several = session.contact.embed([[bare[0], eos], [*bare, eos]]).vectors
        if distance(several[1], text) > allowed:
            mixed = broken(
                expected, "right alone, another vector in a list of lists", "lists of token ids are mixed up"
            )
            return let_noise_pass(session, mixed, [(HELLO, several[1])])
        return held(expected, f"{len(ids)} ids ({source}): 1 - cosine {apart:.1e}", distance=apart)
    without = distance(session.contact.embed(bare).vectors[0], text)
    cause = (
        "the server does not append <|endoftext|> to texts: they match the ids without it"
        if without <= allowed
        else "the server tokenises the text otherwise, or changes it before"
    )
    return broken(expected, f"1 - cosine {apart:.2g} ({without:.2g} without EOS)", cause)


def _ids_of(session: Session) -> tuple[tuple[int, ...], str]:
    """The ids of HELLO with EOS at the end, and who says so; empty when nobody knows."""
    try:
        reply = session.contact.tokenize(HELLO)
    except NetworkError:
        return (), ""
    tokens = reply.data.get("tokens") if reply.status == 200 and isinstance(reply.data, dict) else None
    catalog = session.identity.catalog
    eos = catalog.eos_token_id if catalog else (EOS_ID if serves_demo(session) else None)
    if isinstance(tokens, list) and len(tokens) > 1 and all(isinstance(t, int) for t in tokens):
        if eos is not None and tokens[-1] != eos:
            tokens = [*tokens, eos]
        return tuple(tokens), "by the server's tokenizer"
    if catalog:
        return (*HELLO_IDS, catalog.eos_token_id), "by the official tokenizer"
    return (), ""


def probe_large_batch(session: Session) -> Outcome:
    """A batch larger than servers compute at once: cut into parts, it must come back whole and in order."""
    allowed = session.precision.distance
    expected = f"{LARGE} texts in one request get their own vectors"
    texts = [BASE[i // 9] if i % 9 == 4 and i // 9 < len(BASE) else f"text number {i}" for i in range(LARGE)]
    try:
        vectors = session.contact.embed(texts, may_refuse=True).vectors
    except Misanswer as exc:
        if not exc.refused:
            raise
        return broken(
            expected, exc.message, "batches are limited: clients must know by how much", advisory=not session.strict
        )
    right = {t: v for t, v in zip(BASE, session.base, strict=True) if has_direction(v)}
    wrong = [(t, v) for t, v in zip(texts, vectors, strict=True) if t in right and distance(v, right[t]) > allowed]
    found = held(expected, f"{len(right)} of them compared")
    if wrong:
        seen = f"{len(wrong)} of {len(right)} compared differ, the first {quoted(wrong[0][0])}"
        cause = "large batches are cut into parts that are put together wrongly, or change their vectors"
        found = let_noise_pass(session, broken(expected, seen, cause), wrong)
        if not found.advisory:
            return found
    fillers = [v for t, v in zip(texts, vectors, strict=True) if t not in BASE]
    if any(distance(a, b) < SAME for a, b in pairwise(fillers)):
        return broken(expected, "neighbours in the batch have one vector", "a vector of the batch is repeated")
    return found


def probe_long_batch(session: Session) -> Outcome:
    """Long texts alone and together: past the sizes of its graphs an engine goes another way through the model."""
    allowed = session.precision.distance
    expected = f"long texts have the same vectors alone and together, 1 - cosine ≤ {allowed:.1e}"
    try:
        words = _words_for(session, LONG_TOKENS)
        texts = [long_text(words, 40 + i) for i in range(LONG_TEXTS)]
        began = time.monotonic()
        session.singles[texts[0]] = session.contact.embed(texts[0], may_refuse=True).vectors[0]
        took = time.monotonic() - began
        if took > LONG_SECONDS:
            return skipped(f"a text of {words} words takes {took:.0f} s here: {LONG_TEXTS} of them were not asked")
        alone = session.vectors(texts)
        together = session.contact.embed(texts, may_refuse=True).vectors
    except Misanswer as exc:
        if not exc.refused:
            raise
        return skipped(f"{LONG_TEXTS} texts of {LONG_TOKENS} tokens are not taken: {exc.message}")
    off = max(distance(a, b) for a, b in zip(alone, together, strict=True))
    seen = f"{LONG_TEXTS} of {words} words, {off:.1e} at most"
    if off <= allowed:
        return held(expected, seen, worst=off)
    cause = "what is computed in a long pass is not what a short one gives: graphs, chunks or kernels of another size"
    wrong = [(t, v) for t, a, v in zip(texts, alone, together, strict=True) if distance(a, v) > allowed]
    return let_noise_pass(session, broken(expected, seen, cause, worst=off), wrong)


def _words_for(session: Session, tokens: int) -> int:
    """How many words of `long_text` make so many tokens here: a tokenizer of bytes makes six of each."""
    counted = session.contact.embed(long_text(SAMPLE, 40), may_refuse=True).tokens
    return round(tokens * SAMPLE / counted) if counted else tokens


def probe_cross_talk(session: Session) -> Outcome:
    """Short and long texts, several dims, alone and in batches, many at a time: each gets its own vector."""
    allowed = session.precision.distance
    expected = "under mixed load each request gets its own texts' vectors"
    texts = [*BASE, *(long_text(60 + 90 * i, 30 + i) for i in range(4))]
    right = session.fitting(texts)
    texts = list(right)
    width = session.width
    source = random.Random(7)  # noqa: S311 - an order, not a secret
    jobs: list[tuple[list[str], int | None]] = []
    for i in range(96):
        some = [source.choice(texts) for _ in range(1 if i % 3 else source.randint(2, 6))]
        jobs.append((some, source.choice((None, None, width // 2, width // 4)) if width >= 128 else None))

    def ask(job: tuple[list[str], int | None]) -> tuple[str, list[tuple[str, Vector]]]:
        some, dims = job
        try:
            answer = session.contact.embed(some if len(some) > 1 else some[0], dims=dims)
        except Misanswer as exc:
            return f"failed: {exc.message}", []
        away: list[tuple[str, Vector]] = []
        for text, vector in zip(some, answer.vectors, strict=True):
            if len(vector) != (dims or width):
                return f"{len(vector)} dims for {dims or width} asked", []
            if distance(vector, right[text][: len(vector)]) > allowed * (width / len(vector)):
                away.append((text, vector))
        if not away:
            return "", []
        text, vector = away[0]
        owner = next((t for t, v in right.items() if distance(vector, v[: len(vector)]) <= allowed), None)
        told = f"{quoted(text)} got the vector of {quoted(owner)}" if owner else f"{quoted(text)}: another vector"
        return told, away

    wrong = [(told, away) for told, away in session.parallel(ask, jobs, 16) if told]
    found = [told for told, _ in wrong]
    if not found:
        return held(expected, f"{len(jobs)} requests, 16 at a time")
    mixed = [f for f in found if "got the vector" in f]
    cause = (
        "cross-talk: answers of concurrent requests are mixed up"
        if mixed
        else "requests fail under load"
        if all(f.startswith("failed") for f in found)
        else "vectors change under load: batching, padding or noise"
    )
    outcome = broken(expected, f"{_rate(len(found), len(jobs), 'wrong')}: {(mixed or found)[0]}", cause)
    if not all(away for _, away in wrong):  # some failed, or have another width
        return outcome
    return let_noise_pass(session, outcome, [pair for _, away in wrong for pair in away], fewer_dims=True)


def probe_scripts(session: Session) -> Outcome:
    expected = "one token, emoji, mixed Chinese and English: answered and unlike each other"
    if one_for_all(session):
        return skipped(ONE_FOR_ALL)
    texts = (ONE_TOKEN, "I", EMOJI, "🍕", MIXED, "中", "e\u0301\u200d\ufeff", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff")
    vectors = session.vectors(texts)
    bad = [t for t, v in zip(texts, vectors, strict=True) if not finite(v)]
    if bad:
        return broken(expected, f"NaN for {quoted(bad[0])}", "not finite: see the first check")
    for i, a in enumerate(vectors):
        for j in range(i):
            if distance(a, vectors[j]) < SAME:
                return broken(expected, f"{texts[j]!r} = {texts[i]!r}", "characters outside ASCII are dropped")
    return held(expected, f"{len(texts)} texts")


EARLY = (Probe("answers", "answers at all", probe_answers),)
PROBES = (
    Probe("base64", "base64 = float", probe_base64),
    Probe("usage", "usage counts tokens", probe_usage, required=True),
    Probe("steady", "same text, same vector", probe_steady),
    Probe("latency", "speed of one text", probe_latency),
    Probe("openai", "the OpenAI client", probe_openai, level="full"),
    Probe("token_ids", "token ids = text", probe_token_ids, level="full"),
    Probe("scripts", "odd texts", probe_scripts, level="full"),
    Probe("large_batch", "large batches", probe_large_batch, level="full"),
    Probe("long_batch", "long texts together", probe_long_batch, level="full"),
    Probe("cross_talk", "no cross-talk under load", probe_cross_talk, level="full"),
)
