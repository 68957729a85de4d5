"""Schemathesis against a gateway: what its own OpenAPI document promises, asked for by somebody who only read that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from qwen3emb_launch.gateway import openapi
from tests.null_engine import NullEngine
from tests.test_gateway_clients import served_gateway

PATHS = openapi.document()["paths"]
GOOD = [(path, method, GenerationMode.POSITIVE) for path, row in PATHS.items() for method in row]
BAD = [("/v1/embeddings", "post", GenerationMode.NEGATIVE)]  # the others take nothing that could break a schema


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as one:
        one.trust_env = False
        yield one


@pytest.fixture(scope="module")
def api(session: requests.Session) -> Iterator[schemathesis.BaseSchema]:
    with served_gateway(NullEngine(64)) as url:
        base = url.removesuffix("/v1")
        loaded = schemathesis.openapi.from_dict(session.get(f"{base}/openapi.json", timeout=10).json())
        loaded.config.update(base_url=base)
        yield loaded


@pytest.mark.parametrize(("path", "method", "mode"), GOOD + BAD)
def test_every_operation_answers_as_documented(
    api: schemathesis.BaseSchema, session: requests.Session, path: str, method: str, mode: GenerationMode
) -> None:
    """No 5xx, no status, content type or body that the document does not name; what breaks the schema is refused."""
    operation = api[path][method.upper()]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(session=session, timeout=30)

    check()
