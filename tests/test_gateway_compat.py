"""The clients people use, their real packages unchanged: OpenAI for Node, LangChain, LlamaIndex."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_REGISTRY = 75  # as benchmarks/gateway_compat.py ends where npm reaches no registry


@pytest.mark.skipif(shutil.which("npm") is None, reason="no Node.js here")
def test_the_real_clients_get_each_texts_vector_and_errors_in_openai_form() -> None:
    """Installed once into the cache folder (npm, pip). What LangChain sends by default, another tokenizer's ids, is
    refused with the setting that mends it."""
    argv = [sys.executable, str(ROOT / "benchmarks" / "gateway_compat.py"), "--json"]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    if ran.returncode == NO_REGISTRY:
        pytest.skip(f"the Node client cannot be fetched: {ran.stderr.strip()[-300:]}")
    assert ran.returncode == 0, ran.stderr[-3000:]
    clients = json.loads(ran.stdout)["clients"]
    assert set(clients) == {"openai for Node", "LangChain", "LlamaIndex"}
    assert clients["openai for Node"]["refused"] == "400 blank_input"
    assert clients["LangChain"]["refused"] == "400 bad_token_id True"  # the demo's vocabulary is small
