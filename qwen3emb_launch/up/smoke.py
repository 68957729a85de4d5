"""The smoke test itself, through the OpenAI client as users have it: `python -m qwen3emb_launch.up.smoke`.

Proves on a fresh endpoint: the full and a smaller width come back as asked, vectors have length 1, a batch keeps its
order, the same text gives the same vector, different texts do not.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen3emb_launch.catalog import MIN_DIMS
from qwen3emb_launch.engine_process.guard import die_with_parent

if TYPE_CHECKING:
    from openai import OpenAI

TEXTS = ("The capital of China is Beijing.", "Gravity attracts two bodies towards each other.", "今天天气很好。")
SAME = 0.999  # cosine from which two vectors are the same, bfloat16's rounding and batching allowed for
NORM_TOLERANCE = 0.01

Vector = Sequence[float]


def main() -> None:
    """Read the order, test, answer; the libraries are loaded while the order is awaited."""
    die_with_parent()
    from openai import DefaultHttpxClient, OpenAI, OpenAIError

    line = sys.stdin.readline()
    if not line:
        return
    order = json.loads(line)
    http = DefaultHttpxClient(trust_env=False)  # a proxy has no business between two processes of one machine
    client = OpenAI(base_url=order["base_url"], api_key=order["key"] or "none", http_client=http, timeout=60)
    try:
        faults = test(client, order["model"], order["max_dims"])
    except OpenAIError as error:
        faults = [f"{type(error).__name__}: {error}"]
    sys.stdout.write(json.dumps({"faults": faults, "report": None}) + "\n")


def test(client: OpenAI, model: str, max_dims: int) -> list[str]:
    """What is wrong with the endpoint, a sentence each. Raises OpenAIError when a request fails."""
    few = min(MIN_DIMS, max_dims)
    batch = embed(client, model, TEXTS)
    alone = [vector for text in TEXTS for vector in embed(client, model, [text])]
    again = embed(client, model, TEXTS[:1])
    narrow = embed(client, model, TEXTS[:1], dimensions=few)
    faults = []
    for what, vectors, count, width in (
        ("a batch", batch, len(TEXTS), max_dims),
        ("single texts", alone, len(TEXTS), max_dims),
        ("a repeated text", again, 1, max_dims),
        (f"dimensions={few}", narrow, 1, few),
    ):
        faults += shape_faults(what, vectors, count, width)
    return faults or vector_faults(batch, alone, again[0], narrow[0])


def shape_faults(what: str, vectors: Sequence[Vector], count: int, width: int) -> list[str]:
    """Count, width, finiteness and length of an answer's vectors."""
    if len(vectors) != count:
        return [f"{what}: {len(vectors)} vectors for {count} texts"]
    for vector in vectors:
        if len(vector) != width:
            return [f"{what}: {len(vector)} numbers came back, {width} were asked for"]
        if not all(map(math.isfinite, vector)):
            return [f"{what}: NaN or infinity in a vector"]
        norm = math.sqrt(math.fsum(v * v for v in vector))
        if abs(norm - 1) > NORM_TOLERANCE:
            return [f"{what}: a vector's length is {norm:.4g}, not 1"]
    return []


def vector_faults(batch: Sequence[Vector], alone: Sequence[Vector], again: Vector, narrow: Vector) -> list[str]:
    """Repeatability, distinctness, a batch's order, and the smaller width being the cut and renormalised vector."""
    first = alone[0]
    if cosine(first, again) < SAME:
        return ["the same text gives another vector the second time"]
    if all(cosine(first, other) >= SAME for other in alone[1:]):
        return ["different texts give the same vector"]
    faults = []
    if any(cosine(a, b) < SAME for a, b in zip(batch, alone, strict=True)):
        found = all(any(cosine(a, b) >= SAME for b in batch) for a in alone)
        faults.append("a batch's order is lost" if found else "a text's vector in a batch is not the one it has alone")
    if cosine(first[: len(narrow)], narrow) < SAME:
        faults.append(f"{len(narrow)} dimensions are not the cut and renormalised full vector")
    return faults


def embed(client: OpenAI, model: str, texts: Sequence[str], **options: Any) -> list[list[float]]:
    """The vectors in the order of the answer's own `index`."""
    answer = client.embeddings.create(model=model, input=list(texts), encoding_format="float", **options)
    return [item.embedding for item in sorted(answer.data, key=lambda item: item.index)]


def cosine(a: Vector, b: Vector) -> float:
    """The cosine of two vectors of any length but zero."""
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


if __name__ == "__main__":
    main()
