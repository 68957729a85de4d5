"""One real embedding, asked over plain HTTP: the only proof of life that counts.

SGLang's `/health` may answer 200 while embeddings hang, so nothing else is believed. Standard library only, since the
supervisor does this for months. Proxies of the environment are not consulted.
"""

from __future__ import annotations

import http.client
import json
import math
import time
from dataclasses import dataclass
from enum import StrEnum

NORM_TOLERANCE = 0.05  # vectors are unit length, rounded to bfloat16: 0.5% at most was seen
ANSWER_LIMIT = 4 << 20  # bytes; 4096 numbers take about 90 kB


class Verdict(StrEnum):
    """What one embedding told."""

    OK = "ok"
    UNREACHABLE = "unreachable"  # nobody listens, or the connection broke
    SLOW = "slow"  # no answer within the deadline
    REFUSED = "refused"  # an HTTP status other than 200
    WRONG = "wrong"  # an answer that is no embedding: another width, NaN, not of unit length


@dataclass(frozen=True)
class Answer:
    """The verdict, seconds it took, and one sentence for people. `status` is HTTP's, where there was one."""

    verdict: Verdict
    seconds: float
    detail: str = ""
    status: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the engine embeds."""
        return self.verdict is Verdict.OK


@dataclass(frozen=True)
class Target:
    """Where to ask, for which model, how many numbers to expect. `key` is the engine's API key, if it has one."""

    host: str
    port: int
    model: str
    dims: int
    key: str | None = None


def embed_once(target: Target, text: str, timeout: float) -> Answer:
    """Embed one text within `timeout` seconds in all and judge the answer. Raises nothing."""
    begin = time.monotonic()

    def answer(verdict: Verdict, detail: str = "", status: int | None = None) -> Answer:
        return Answer(verdict, time.monotonic() - begin, detail, status)

    connection = http.client.HTTPConnection(target.host, target.port, timeout=timeout)
    try:
        status, body = _post(connection, target, text, begin + timeout)
    except TimeoutError:
        return answer(Verdict.SLOW, f"no answer within {timeout:g} s")
    except (OSError, http.client.HTTPException) as error:
        return answer(Verdict.UNREACHABLE, f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    if status != 200:
        return answer(Verdict.REFUSED, f"HTTP {status}: {body[:300].decode(errors='replace')}", status)
    fault = fault_of(body, target.dims)
    return answer(Verdict.WRONG, fault, status) if fault else answer(Verdict.OK, status=status)


def _post(connection: http.client.HTTPConnection, target: Target, text: str, deadline: float) -> tuple[int, bytes]:
    headers = {"content-type": "application/json"}
    if target.key:
        headers["authorization"] = f"Bearer {target.key}"
    body = json.dumps({"model": target.model, "input": text, "encoding_format": "float"})
    connection.connect()
    sock = connection.sock
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    connection.request("POST", "/v1/embeddings", body, headers)
    response = connection.getresponse()
    parts, size = [], 0
    while size < ANSWER_LIMIT:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if connection.sock is not None:  # a socket's time-out is for one read; the deadline is for all of them
            sock.settimeout(left)
        part = response.read1(65536)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return response.status, b"".join(parts)


def fault_of(body: bytes, dims: int) -> str:
    """What is wrong with an answer to one text; empty when nothing is."""
    try:
        vector = json.loads(body)["data"][0]["embedding"]
        values = [float(v) for v in vector]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return f"not an embedding answer ({type(error).__name__}: {error}): {body[:120].decode(errors='replace')}"
    if len(values) != dims:
        return f"{len(values)} numbers came back, {dims} are right for this model"
    if not all(map(math.isfinite, values)):
        bad = sum(not math.isfinite(v) for v in values)
        return f"{bad} of {dims} numbers are NaN or infinite"
    norm = math.sqrt(math.fsum(v * v for v in values))
    if abs(norm - 1) > NORM_TOLERANCE:
        return f"the vector's length is {norm:.4g}, not 1"
    return ""
