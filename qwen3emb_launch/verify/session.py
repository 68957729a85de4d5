"""What the probes of one run share: the contact, what is known, and vectors asked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from qwen3emb_launch.verify.contact import Contact, Embeddings, Misanswer
from qwen3emb_launch.verify.identity import Identity
from qwen3emb_launch.verify.report import Level, Outcome
from qwen3emb_launch.verify.texts import BASE
from qwen3emb_launch.verify.tolerance import Precision

T = TypeVar("T")
R = TypeVar("R")
Vector = tuple[float, ...]

SURELY_FITS = 400  # bytes: never more tokens than that, and no endpoint takes fewer
FEW = 10  # texts; DashScope's limit, the smallest known
DEFAULT_MAX_LATENCY = 100.0  # milliseconds, one short text, one client


@dataclass(frozen=True)
class Options:
    """What the user asked for. `max_latency` in ms (None: the default, advisory on a CPU); `context` in tokens.

    `openai_client` asks through the official client in the quick level too; importing it takes half a second.
    """

    level: Level = "quick"
    max_latency: float | None = None
    context: int | None = None
    strict: bool = False
    openai_client: bool = False


@dataclass
class Session:
    """One verification in progress."""

    contact: Contact
    identity: Identity
    precision: Precision
    options: Options
    singles: dict[str, Vector] = field(default_factory=dict)
    tokens: dict[str, int | None] = field(default_factory=dict)
    few: bool = False  # more than FEW texts in a request were refused

    def vector(self, text: str) -> Vector:
        """The full vector of one text, asked alone, once."""
        if text not in self.singles:
            self.keep(text, self.contact.embed(text))
        return self.singles[text]

    def keep(self, text: str, answer: Embeddings) -> None:
        """Remember the answer to a text asked alone."""
        self.tokens[text] = answer.tokens
        self.singles[text] = answer.vectors[0]

    def vectors(self, texts: Sequence[str]) -> list[Vector]:
        """Full vectors, each asked alone, one after another: what load does to them is another check's business."""
        return [self.vector(text) for text in texts]

    def together(self, texts: Sequence[str], cached: bool = False) -> tuple[Vector, ...]:
        """Full vectors of one request; of several, of FEW texts each, where a foreign endpoint takes no more at once.

        Hosted APIs limit a request to 10 or 32 texts, which is no fault of their vectors.
        """
        foreign = self.identity.engine != "sglang" and not self.identity.gateway
        if len(texts) <= FEW or not foreign:
            return self.contact.embed(list(texts), cached=cached).vectors
        if not self.few:
            try:
                return self.contact.embed(list(texts), may_refuse=True, cached=cached).vectors
            except Misanswer as exc:
                if not exc.refused:
                    raise
                self.few = True
        parts = [texts[i : i + FEW] for i in range(0, len(texts), FEW)]
        return tuple(v for part in parts for v in self.contact.embed(list(part), cached=cached).vectors)

    def fitting(self, texts: Sequence[str]) -> dict[str, Vector]:
        """Full vectors by text, without the long texts that this endpoint's context does not take."""
        found = {}
        for text in texts:
            if text not in self.singles and len(text.encode()) > SURELY_FITS:
                try:
                    self.singles[text] = self.contact.embed(text, may_refuse=True).vectors[0]
                except Misanswer as exc:
                    if not exc.refused:
                        raise
                    continue
            found[text] = self.vector(text)
        return found

    @property
    def base(self) -> list[Vector]:
        """The vectors of BASE, each asked alone."""
        return self.vectors(BASE)

    @property
    def width(self) -> int:
        """The full vector's dims, by the first text."""
        return len(self.vector(BASE[0]))

    @property
    def context_length(self) -> int | None:
        """Tokens, by the user's word or the server's."""
        return self.options.context or self.identity.context_length

    @property
    def strict(self) -> bool:
        """Whether the endpoint is held to what our gateway promises."""
        return self.options.strict or self.identity.gateway

    def parallel(self, function: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
        """`function` of each item, so many at a time, results in order; the first exception is raised."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, items))


@dataclass(frozen=True)
class Probe:
    """One check: what it is called, whether it must hold, from which level on, and how it is asked.

    A `quiet` one is no line of the table where it cannot be asked.
    """

    id: str
    title: str
    run: Callable[[Session], Outcome]
    required: bool = True
    level: Level = "quick"
    quiet: bool = False
