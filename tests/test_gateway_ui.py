"""The status page in a real browser: what it shows after its script has run is what the gateway counted."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import openai
import pytest

from tests.null_engine import NullEngine
from tests.test_gateway_clients import served_gateway

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def shown(url: str, profile: Path) -> dict[str, str]:
    """The texts of a page's elements with an id, after its script has run for five seconds of its own clock."""
    argv = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", f"--user-data-dir={profile}",
        "--virtual-time-budget=5000", "--dump-dom", url,
    ]  # fmt: skip
    dom = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=True).stdout
    found = re.findall(r'<(\w+)[^>]* id="([\w-]+)"[^>]*>(.*?)</\1>', dom, re.DOTALL)
    return {name: unescape(re.sub(r"<[^>]+>", " ", inner)).strip() for _, name, inner in found}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_shows_what_was_counted_and_the_engine(tmp_path: Path) -> None:
    settings = {"price_name": "Some API", "price_per_million": 1_000_000.0, "currency": "EUR"}
    with served_gateway(NullEngine(64, model="a<b>&c"), **settings) as base:
        with openai.OpenAI(
            base_url=base, api_key="x", http_client=openai.DefaultHttpxClient(trust_env=False), max_retries=0
        ) as client:
            for _ in range(2):
                client.embeddings.create(model="a<b>&c", input=["one", "two"])
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model="a<b>&c", input="")
        page = shown(base.removesuffix("/v1") + "/ui", tmp_path)
    assert page["error"] == ""
    assert page["models"] == "· a<b>&c"
    assert page["hits"] == "50.0 %"
    assert page["batch"] == "2"
    assert page["errors"] == "1"
    assert page["saved"] == "8 EUR"  # two tokens a text, by the engine's count
    assert page["saved-of"] == "saved against Some API"
    assert float(page["p95"]) > 0
    assert re.search(r"http://127\.0\.0\.1:\d+/v1\s+up\s+0 calls, 0 texts\s+1\s+0\s+proved", page["upstreams"])
