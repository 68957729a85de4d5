"""A thing to measure, made ready: its model named, its tokenizer's words known, one real request answered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen3emb_launch.bench import calibrate, endpoint, lengths, word_costs
from qwen3emb_launch.bench.spec import Encoding, LoadSpec, Vocabulary
from qwen3emb_launch.bench.texts import capacity, source_of
from qwen3emb_launch.bench.words import WORDS
from qwen3emb_launch.catalog import ModelShape
from qwen3emb_launch.errors import InvalidInputError, LaunchError


@dataclass(frozen=True)
class Target:
    """An endpoint as the user named it: NVML index of its GPU, its local processes, and facts for the record.

    `pids` tells its engines' processes of the moment: one that was started again is another process.
    `plan` is an instance's plan file; `shape` its model's where that is known, `fingerprint` what decides its vectors,
    `tokenizer` the file of the model's tokenizer where it is at hand.
    """

    name: str
    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    verify_tls: bool = True
    gpu: int | None = None
    pids: Callable[[], Sequence[int]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    plan: Path | None = None
    shape: ModelShape | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Work:
    """What each request is, the same for every target. `corpus` is a converted file, `corpus_name` the user's own."""

    batch: int = 1
    tokens: str = "33"
    corpus: str | None = None
    corpus_name: str | None = None
    repeat_rate: float = 0.0
    dims: int | None = None
    encoding: Encoding = "base64"
    unit_norm: bool = True
    timeout: float = 60.0
    max_in_flight: int = 1000
    processes: int = 1
    seed: int = 1

    def public(self) -> dict[str, Any]:
        """For a record: the converted file is temporary."""
        return {**asdict(self), "corpus": self.corpus_name}

    def check(self) -> None:
        """Raise InvalidInputError (`bad_load`) for values that no load can have."""
        for what, value, least in (
            ("--batch", self.batch, 1),
            ("--max-in-flight", self.max_in_flight, 1),
            ("--processes", self.processes, 1),
            ("--dims", 1 if self.dims is None else self.dims, 1),
        ):
            if value < least:
                raise InvalidInputError("bad_load", f"{what} {value}: at least {least}", "qwen3emb bench --help")
        if not 0 <= self.repeat_rate < 1:
            raise InvalidInputError(
                "bad_load", f"--repeat-rate {self.repeat_rate}: from 0 to below 1", "for example 0.3"
            )
        if self.timeout <= 0:
            raise InvalidInputError("bad_load", f"--timeout {self.timeout:g}: above 0 seconds", "for example 60")
        try:
            lengths.parse(self.tokens)
        except ValueError as exc:
            raise InvalidInputError("bad_load", f"--tokens: {exc}", "for example --tokens 512") from exc


@dataclass(frozen=True)
class Ready:
    """A target that answered as the load will ask. `spec` lacks only phases. `notes` are warnings for the record."""

    target: Target
    spec: LoadSpec
    notes: tuple[str, ...] = ()


def prepare(target: Target, work: Work, vocabulary: Vocabulary | None = None) -> Ready:
    """Name the model, calibrate the texts, send one request of the load's own form.

    A `vocabulary` found earlier, on an endpoint of the same model, is taken as it is: the one request checks it.

    Raises the LaunchError that says what is wrong with the endpoint or the load.
    """
    work.check()
    spec = LoadSpec(
        url=target.url.rstrip("/"),
        model=target.model or "",
        phases=(),
        batch=work.batch,
        lengths=work.tokens,
        corpus=work.corpus,
        repeat_rate=work.repeat_rate,
        dims=work.dims,
        encoding=work.encoding,
        unit_norm=work.unit_norm,
        timeout=work.timeout,
        max_in_flight=work.max_in_flight,
        processes=work.processes,
        seed=work.seed,
        headers=dict(target.headers),
        api_key=target.api_key,
        verify_tls=target.verify_tls,
    )
    if not target.model:
        spec = replace(spec, model=endpoint.served_model(spec))
    notes: list[str] = []
    if not work.corpus:
        if vocabulary is None:
            vocabulary = calibrate.vocabulary_of(spec, _costs(target.tokenizer))
        spec = replace(spec, vocabulary=vocabulary)
        notes += _vocabulary_notes(target, vocabulary, work)
    _rehearse(spec, notes)
    return Ready(target, spec, tuple(notes))


def _costs(file: Path | None) -> calibrate.Costs | None:
    return None if file is None else lambda words: word_costs.word_costs(file, words)


def _vocabulary_notes(target: Target, vocabulary: Vocabulary, work: Work) -> list[str]:
    if not vocabulary.exact:
        return [
            f"{target.name} does not count tokens in a way that a few short requests explain: text lengths are in words"
        ]
    shortest = lengths.parse(work.tokens).low
    count = capacity(vocabulary, shortest)
    if count < len(WORDS) ** 3:
        return [f"texts of {shortest} tokens repeat after {count}: a cache may flatter the figures"]
    return []


def _rehearse(spec: LoadSpec, notes: list[str]) -> None:
    """One request as the load will send it, with its longest texts."""
    source = source_of(spec)
    if spec.corpus is None and spec.vocabulary:
        longest = replace(spec, lengths=str(lengths.parse(spec.lengths).high), repeat_rate=0.0)
        source = source_of(longest)
    texts = [json.loads(source.next()) for _ in range(spec.batch)]
    try:
        used = endpoint.embed(spec, texts)
    except LaunchError as error:
        if error.code == "text_refused" and spec.corpus:
            error.hint = "leave texts of that length out of the corpus"
        elif error.code == "text_refused" and not re.fullmatch(r"[\d-]+", spec.lengths):
            error.hint = f"bound the lengths: --tokens {spec.lengths.partition('@')[0]}@LOW-HIGH"
        raise
    wanted = lengths.parse(spec.lengths).high * spec.batch
    if spec.vocabulary and spec.vocabulary.exact and used is not None and used != wanted:
        notes.append(f"texts meant to have {wanted} tokens a request have {used}")
