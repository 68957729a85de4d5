"""The real engine's own argument parser takes every planned command."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import IMPORTED_UNDER
from planning_cases import plan, shipped

from qwen3emb_launch import recorded_flags

READ = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
plans = json.load(open(sys.argv[1]))
read = {name: vars(parser.parse_args(argv)) for name, argv in plans.items()}
keys = ("is_embedding", "context_length", "cuda_graph_bs_prefill", "mem_fraction_static", "disable_radix_cache")
flags = {o for a in parser._actions for o in a.option_strings if o.startswith("--") and o != "--help"}
values = {name: {key: seen[key] for key in keys} for name, seen in read.items()}
json.dump({"read": values, "flags": sorted(flags)}, open(sys.argv[2], "w"))
"""


@pytest.mark.engine
def test_the_engines_own_parser_takes_every_plan(imported_engine: Path, tmp_path: Path) -> None:
    """Each shipped profile and variant, with each model: parsed by SGLang itself into the values that were planned."""
    plans = {f"{p.name} {key}": plan(p, key, "0.5.15.post1") for p in shipped() for key in ("0.6b", "4b", "8b")}
    script, asked, answered = tmp_path / "read.py", tmp_path / "plans.json", tmp_path / "read.json"
    script.write_text(READ)
    asked.write_text(json.dumps({name: made.argv[3:] for name, made in plans.items()}))
    subprocess.run(
        [imported_engine, script, asked, answered],
        env={**os.environ, **IMPORTED_UNDER},
        check=True,
        capture_output=True,
        timeout=180,
    )
    body = json.loads(answered.read_text())
    for name, made in plans.items():
        read = body["read"][name]
        sizes = made.setting("prefill_graph_sizes")
        assert read["is_embedding"] is True
        assert read["context_length"] == made.context_length
        assert read["cuda_graph_bs_prefill"] == (None if sizes is None else list(sizes))
        assert read["mem_fraction_static"] == made.setting("mem_fraction_static")
        assert read["disable_radix_cache"] is not made.setting("radix_cache")
    assert set(recorded_flags.flags("0.5.15.post1")) == set(body["flags"]), (
        "the recorded options are not this release's"
    )
