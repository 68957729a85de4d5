"""The demo checkpoint is complete, repeatable and made of the shape asked for."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from qwen3emb_launch.catalog import shape_from_config
from qwen3emb_launch.demo_model import DemoShape, make_demo_model


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    """Two machines agree on the vectors because they agree on the weights."""
    digest = [sha256((make_demo_model(tmp_path / n) / "model.safetensors").read_bytes()).hexdigest() for n in "ab"]
    assert digest[0] == digest[1] == "25e185ff0d8a7949140375de65832fc826a4aee230dd5c271a8e5106525a246a"


def test_shape_is_as_asked(tmp_path: Path) -> None:
    folder = make_demo_model(tmp_path / "m", DemoShape(hidden_size=128, layers=1, heads=2, kv_heads=1))
    shape = shape_from_config(json.loads((folder / "config.json").read_text()))
    assert (shape.hidden_size, shape.layers, shape.heads, shape.kv_heads) == (128, 1, 2, 1)
    header_length = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert (folder / "model.safetensors").stat().st_size == 8 + header_length + 2 * shape.parameters


def test_a_changed_shape_replaces_the_folder(tmp_path: Path) -> None:
    make_demo_model(tmp_path / "m")
    make_demo_model(tmp_path / "m", DemoShape(layers=1))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
