"""What one load is, as plain data: it crosses a pipe to the worker processes as JSON. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Shape = Literal["closed", "open"]
Encoding = Literal["float", "base64"]


@dataclass(frozen=True)
class Phase:
    """A stretch of constant load. `level` is clients in flight (closed loop) or requests a second (open loop)."""

    name: str
    seconds: float
    level: float
    measured: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """Words of four letters that all cost `per_word` tokens behind a space, on this endpoint's tokenizer.

    A text of n words costs `overhead + n * per_word` tokens; `fillers[r]` is a tail that costs r more.
    `exact` is False when the endpoint does not count tokens: lengths are then in words.
    """

    words: tuple[str, ...]
    per_word: int = 1
    overhead: int = 0
    fillers: tuple[str, ...] = ("",)
    exact: bool = False


@dataclass(frozen=True)
class LoadSpec:
    """One load on one endpoint.

    `url` is the base URL as the OpenAI client takes it. `lengths` are tokens a text, as `lengths.parse` reads them.
    `requests` (per run, warm-up left out) ends the last phase early. `corpus` is a file of one JSON string a line.
    `text_start` numbers the first text, each of `processes` takes every so-manieth: two runs with ranges apart share no
    text. `max_in_flight` bounds the open loop's connections; arrivals beyond it wait in the client with their clock
    running. `drain` is how long answers are awaited after the last phase.
    """

    url: str
    model: str
    phases: tuple[Phase, ...]
    shape: Shape = "closed"
    batch: int = 1
    lengths: str = "33"
    vocabulary: Vocabulary | None = None
    corpus: str | None = None
    repeat_rate: float = 0.0
    dims: int | None = None
    encoding: Encoding = "base64"
    unit_norm: bool = True
    requests: int | None = None
    timeout: float = 60.0
    drain: float = 30.0
    max_in_flight: int = 1000
    seed: int = 1
    text_start: int = 0
    processes: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    verify_tls: bool = True

    @property
    def seconds(self) -> float:
        """Length of all phases."""
        return sum(p.seconds for p in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """For the pipe to a worker, key included; records use `public`."""
        return asdict(self)

    def public(self) -> dict[str, Any]:
        """The same without the key, the caller's headers and the word list: what a record keeps."""
        out = asdict(self)
        for private in ("api_key", "headers"):
            out.pop(private)
        if self.vocabulary:
            out["vocabulary"] = {k: v for k, v in out["vocabulary"].items() if k != "words"}
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoadSpec:
        """The inverse of `to_dict`. Raises TypeError for an unknown or missing key."""
        values = dict(data)
        values["phases"] = tuple(p if isinstance(p, Phase) else Phase(**p) for p in values.get("phases", ()))
        vocabulary = values.get("vocabulary")
        if isinstance(vocabulary, Mapping):
            listed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in vocabulary.items()}
            values["vocabulary"] = Vocabulary(**listed)
        return cls(**values)

    def share(self, worker: int) -> LoadSpec:
        """The part of worker number `worker` of `processes`: its share of the level, its own seed and texts."""
        if self.processes == 1:
            return self
        count = self.processes

        def part(level: float) -> float:
            if self.shape == "open":
                return level / count
            whole = int(level)
            return whole // count + (1 if worker < whole % count else 0)

        return replace(
            self,
            phases=tuple(replace(p, level=part(p.level)) for p in self.phases),
            requests=None if self.requests is None else self.requests // count + (worker < self.requests % count),
            max_in_flight=max(1, self.max_in_flight // count),
            seed=self.seed * 1000 + worker,
            text_start=self.text_start + worker,
        )
