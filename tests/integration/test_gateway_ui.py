"""The status page in a real headless browser. Skipped where there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qwen3emb_launch.client import Client
from tests.null_engine import NullEngine
from tests.test_gateway_clients import served_gateway

BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_status_page_shows_live_numbers(tmp_path: Path) -> None:
    """Rate, percentiles, cache hits, engines and money, filled in by the page's own script without an error."""
    with served_gateway(NullEngine(64), price_name="Some API", price_per_million=0.02) as url:
        with Client(url) as client:
            for _ in range(4):
                client.embed(["a", "b", "c"])
        page = url.removesuffix("/v1") + "/ui"
        argv = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
                "--no-proxy-server", "--virtual-time-budget=4000", "--dump-dom", page]  # fmt: skip
        dom = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "· null" in dom
    assert "75.0 %" in dom
    assert 'class="up">up<' in dom
    assert "saved against Some API" in dom
    assert '<span id="error" role="alert"></span>' in dom
    assert "connecting" not in dom
