"""What `up` answers once an instance serves: where, as what, how to call it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from qwen3emb_launch.state import InstanceRecord


@dataclass(frozen=True)
class Serving:
    """A ready instance. `seconds` from the supervisor's start to ready; `base_url` as the OpenAI client takes it.

    `gateway`: it is the gateway's address; `needs_key`: users need an API key.
    """

    name: str
    base_url: str
    model: str
    profile: str
    max_dims: int
    context_length: int
    pid: int | None
    engine_pids: tuple[int, ...]
    seconds: float | None
    log: str | None
    gateway: bool = False
    needs_key: bool = False


def serving(record: InstanceRecord) -> Serving:
    """The answer for a record whose instance is ready."""
    return Serving(
        name=record.name,
        base_url=record.base_url,
        model=record.served_model_name,
        profile=record.profile,
        max_dims=record.max_dims,
        context_length=record.context_length,
        pid=record.supervisor.pid if record.supervisor else None,
        engine_pids=tuple(engine.pid for engine in record.engines),
        seconds=round(record.ready_at - record.started_at, 3) if record.ready_at else None,
        log=record.log,
        gateway=any(unit.kind == "gateway" for unit in record.units),
        needs_key=record.needs_key,
    )


def snippet(base_url: str, model: str, max_dims: int, *, needs_key: bool = False) -> str:
    """Ready to paste: the same request in Python and with curl."""
    dims = max(32, max_dims // 4)
    name = json.dumps(model, ensure_ascii=False)
    body = shlex.quote(f'{{"model": {name}, "input": ["Hello, world"], "dimensions": {dims}}}')
    url = shlex.quote(f"{base_url}/embeddings")  # brackets of an IPv6 address are a pattern to zsh
    key = "YOUR_API_KEY" if needs_key else "none"
    header = " -H 'authorization: Bearer YOUR_API_KEY'" if needs_key else ""
    return f"""\
# Python: pip install openai
from openai import OpenAI
client = OpenAI(base_url="{base_url}", api_key="{key}")
answer = client.embeddings.create(model={name}, input=["Hello, world"], dimensions={dims})
print(answer.data[0].embedding)

# shell
curl -s {url} -H 'content-type: application/json'{header} \\
  -d {body}"""
