"""Write the demo checkpoint's reference vectors again: float32 transformers, in the engine environment's python.

    python benchmarks/demo_reference.py ENGINE_PYTHON

`qwen3emb verify` holds a demo endpoint to this file; a test computes it again and compares.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.verify.reference import DEMO_SET, ReferenceSet, config_hash, save, transformers_reference
from qwen3emb_launch.verify.texts import BASE


def demo_reference(python: Path, scratch: Path) -> ReferenceSet:
    """The set for the default demo checkpoint: the texts that the quick level asks anyway."""
    folder = make_demo_model(scratch / "demo")
    found = transformers_reference(python, folder, BASE, dtypes=("float32",)).sets["float32"]
    return replace(found, model="demo", fingerprint={"config": config_hash(folder)})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        save(demo_reference(Path(sys.argv[1]), Path(scratch)), DEMO_SET)
    print(DEMO_SET)
