"""Checks that the text arrives whole: nothing rewritten, nothing cut, lengths honoured to the last token."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3emb_launch.errors import NetworkError
from qwen3emb_launch.vectors import distance, finite, norm
from qwen3emb_launch.verify.contact import Misanswer
from qwen3emb_launch.verify.probes_vectors import BY_LENGTH, ONE_FOR_ALL, SAME, one_for_all, quoted
from qwen3emb_launch.verify.report import Outcome, broken, held, skipped
from qwen3emb_launch.verify.session import Probe, Session
from qwen3emb_launch.verify.texts import PAIRS, long_text

PREFIXES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens that two texts share before they part
SAMPLE_WORDS = 40  # under 300 bytes, so under 300 tokens
LONGEST = 1 << 20  # tokens; a text of as many as a wrong configuration may say would fill the memory
LONG_TIMEOUT = 4.0  # times the ordinary one, for texts near the context length


def probe_faithful(session: Session) -> Outcome:
    expected = "texts that differ in case, white space, script or template get other vectors"
    if one_for_all(session):
        return skipped(ONE_FOR_ALL)
    texts = [t for pair in PAIRS for t in (pair.a, pair.b)]
    session.together([pair.a for pair in PAIRS])  # an engine's cache that confuses the two knows the first now
    rounds = [session.together(texts)]
    if session.identity.gateway:  # and so do its own caches
        rounds.append(session.together(texts, cached=True))
    alike = [
        pair for i, pair in enumerate(PAIRS) if any(distance(v[2 * i], v[2 * i + 1]) < SAME for v in rounds)
    ]  # fmt: skip
    if not alike:
        return held(expected, f"{len(PAIRS)} pairs")
    first = alike[0]
    of_one_length = [pair for pair in PAIRS if len(pair.a) == len(pair.b)]
    return broken(
        expected,
        f"{len(alike)} of {len(PAIRS)} pairs are one vector: {quoted(first.a, 60)} = {quoted(first.b, 60)}",
        BY_LENGTH
        if alike == of_one_length
        else "in large batches texts get the vector of another; alone they are told apart"
        if distance(session.vector(first.a), session.vector(first.b)) >= SAME
        else "; ".join(dict.fromkeys(pair.fault for pair in alike)),
    )


@dataclass(frozen=True)
class Lengths:
    """How a long text's tokens go up with its words: exact texts by calibration on the server's own count."""

    words: int
    tokens: int
    fixed: int

    @property
    def per_word(self) -> float:
        """Tokens a word of the long text, EOS apart."""
        return (self.tokens - self.fixed) / self.words

    def words_for(self, tokens: int) -> int:
        """How many words make about that many tokens, never more."""
        return max(1, int((tokens - self.fixed) / self.per_word))


def calibrate(session: Session) -> Lengths | None:
    """Tokens a word, by two counted requests; None when the server counts nothing."""
    small = session.contact.embed(long_text(1, 9)).tokens
    many = session.contact.embed(long_text(SAMPLE_WORDS, 9)).tokens
    if small is None or many is None or many <= small:
        return None
    return Lengths(SAMPLE_WORDS, many, 1)


def probe_tail(session: Session) -> Outcome:
    expected = "texts that differ only after N tokens get other vectors"
    lengths = calibrate(session)
    per_word = lengths.per_word if lengths else 1.3
    if one_for_all(session):
        return skipped(ONE_FOR_ALL)
    room = (session.context_length or 8192) - 8
    reached = 0
    for shared in PREFIXES:
        if 2.3 * shared > room:  # the words' lengths are estimates
            break
        try:
            if not _told_apart(session, shared, per_word):
                return _cut_at(session, expected, reached, shared, per_word)
        except Misanswer as exc:
            return broken(expected, f"{2 * shared} tokens: {exc.message}", exc.cause)
        reached = shared
    if reached and _ends_count_only(session, reached, per_word):
        return broken(
            "texts that differ only before their last N tokens get other vectors",
            f"one vector for two texts that share their last {reached} tokens or so",
            "the beginning of long texts is cut off, or they are cached by their end",
            shared=reached,
        )
    return held(expected, f"up to {reached} shared tokens", shared=reached)


def _parting(shared: int, per_word: float) -> tuple[str, str, str]:
    """A head of about that many tokens, and two texts of twice its length that begin with it."""
    head = long_text(max(1, int(shared / per_word)), 40 + shared)
    tail = max(8, int(shared / per_word) - 1)
    return head, f"{head} {long_text(tail, 2)}", f"{head} {long_text(tail, 11)}"


def _told_apart(session: Session, shared: int, per_word: float) -> bool:
    _, a, b = _parting(shared, per_word)
    return _unlike(session, a, b)


def _unlike(session: Session, a: str, b: str) -> bool:
    """Whether two texts get two vectors, asked one after the other: so a cache knows the first."""
    timeout = LONG_TIMEOUT * session.contact.timeout
    first, second = (session.contact.embed(text, timeout=timeout).vectors[0] for text in (a, b))
    return distance(first, second) >= SAME


def _ends_count_only(session: Session, shared: int, per_word: float) -> bool:
    """Whether two texts with one end of that many tokens get one vector."""
    words = max(8, int(shared / per_word))
    end = long_text(words, 90 + shared)
    return not _unlike(session, f"{long_text(words, 4)} {end}", f"{long_text(words, 13)} {end}")


def _cut_at(session: Session, expected: str, fine: int, shared: int, per_word: float) -> Outcome:
    """Where the texts are cut: between `fine` and `shared` tokens, halved until it is known to a sixteenth."""
    while shared - fine > max(8, shared // 16):
        middle = (fine + shared) // 2
        if _told_apart(session, middle, per_word):
            fine = middle
        else:
            shared = middle
    head, a, _ = _parting(shared, per_word)
    answer = session.contact.embed([head, a], timeout=LONG_TIMEOUT * session.contact.timeout)
    cut = distance(*answer.vectors) < SAME
    return broken(
        expected,
        f"one vector for two texts that part after about {shared} tokens",
        f"texts are truncated at about {shared} tokens"
        if cut
        else f"texts are told apart by their first {shared} tokens or so only: cached by prefix, or cut",
        shared=shared,
    )


def probe_limit(session: Session) -> Outcome:
    """The longest text that fits is answered, the first that does not is refused."""
    context = session.context_length
    if context is None:
        return skipped("the server does not say its context length; --context N")
    if context > LONGEST:
        return skipped(f"the server says {context} tokens; no model here takes more than {LONGEST}: --context N")
    # SGLang and our gateway refuse a text as long as the context; others may take that and refuse the next.
    over_tokens = context if session.identity.gateway or session.identity.engine == "sglang" else context + 1
    expected = f"{context - 1} tokens are answered, {over_tokens} are refused with 4xx"
    lengths = calibrate(session)
    if lengths is None:
        return skipped("the server counts no tokens, so a text of a known length cannot be made")
    timeout = LONG_TIMEOUT * session.contact.timeout
    try:
        tokens = context - 1
        made = exact_texts(session, lengths, tokens, over_tokens)
        if made is None:
            return skipped("the server's token counts do not add up, so a text of a known length cannot be made")
        text, over = made
    except Misanswer as exc:
        return broken(expected, f"shorter texts already: {exc.message}", _too_long(exc))
    try:
        answer = session.contact.embed(text, timeout=timeout, may_refuse=True)
    except Misanswer as exc:
        return broken(expected, f"{tokens} tokens: {exc.message}", _too_long(exc))
    vector = answer.vectors[0]
    if not finite(vector) or abs(norm(vector) - 1) > session.precision.norm:
        return broken(expected, f"{tokens} tokens: a vector of length {norm(vector):.3f}", "long texts overflow")
    if answer.tokens != tokens and answer.headers.get("x-qwen3emb-usage") != "estimated":
        return broken(expected, f"{tokens} tokens sent, {answer.tokens} counted", "long texts are cut without a word")
    try:
        reply = session.contact.post("embeddings", {"model": session.contact.model, "input": over}, timeout)
    except NetworkError as exc:
        return broken(
            expected,
            f"{over_tokens} tokens: {exc.message}",
            "a text longer than the context or the KV pool blocks the queue (sgl-project/sglang#40459)",
        )
    if reply.status == 200:
        told = [name for name in reply.headers if "truncat" in name.lower()]
        if told:
            return held(expected, f"{tokens} answered, {over_tokens} truncated and said so ({told[0]})")
        return broken(
            expected,
            f"{over_tokens} tokens are answered with 200",
            "texts longer than the context are cut without a word (SGLang's --allow-auto-truncate also drops the EOS)",
        )
    if reply.status >= 500:
        return broken(
            expected, f"{over_tokens} tokens: {reply.status}", "too long a text reaches code that fails on it"
        )
    return held(expected, f"{tokens} answered in {answer.seconds:.2f} s, {over_tokens} refused with {reply.status}")


def _too_long(exc: Misanswer) -> str:
    if exc.refused:
        return (
            "less is taken than the endpoint says, or --context was told: a gateway or proxy with another context "
            "length than its engine's"
        )
    return exc.cause


def exact_texts(session: Session, lengths: Lengths, *wanted: int) -> list[str] | None:
    """Texts of exactly so many tokens by the server's count, the fewest first: words, then ` a` one token at a time.

    They begin alike, so that the long part is counted once. Its length is predicted from a text of half that, so that
    it comes near the limit and not above.
    """
    tokens = wanted[0]
    half = lengths.words_for(tokens // 2)
    measured = Lengths(half, _counted(session, long_text(half, 21)), 1)
    text = long_text(measured.words_for(tokens - max(64, tokens // 32)), 21)
    step = _tokens_of_filler(session)
    if step is None:
        return None
    counted = _counted(session, text)
    return [text + " a" * ((n - counted) // step) + "a" * ((n - counted) % step) for n in wanted]


def _counted(session: Session, text: str) -> int:
    """Its tokens as the server counts them, asked once."""
    if text not in session.tokens:
        timeout = LONG_TIMEOUT * session.contact.timeout
        session.tokens[text] = session.contact.embed(text, timeout=timeout, may_refuse=True).tokens
    return session.tokens[text] or 0


def _tokens_of_filler(session: Session) -> int | None:
    """Tokens that ` a` adds: 1 by the official tokenizer, 2 by a byte-level one; None when it is not one number."""
    few, more = (_counted(session, "b" + " a" * n) for n in (4, 24))
    step, rest = divmod(more - few, 20)
    return step if step > 0 and rest == 0 else None


PROBES = (
    Probe("faithful", "texts arrive unchanged", probe_faithful),
    Probe("tail", "long texts arrive whole", probe_tail, level="full"),
    Probe("limit", "the longest text that fits", probe_limit, level="full"),
)
