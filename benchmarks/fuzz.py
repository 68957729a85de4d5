"""Coverage-guided fuzzing of everything that reads files, for as long as you like.

    pip install atheris                                   (wheels for CPython 3.11 to 3.13 on Linux)
    python benchmarks/fuzz.py instance --seconds 600
    python benchmarks/fuzz.py --list

The targets are those of tests/test_fuzz.py, which runs a few dozen inputs each. A crash prints the exception and writes
the input to crash-*, from which the same command with that file behind it repeats it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def main() -> None:
    """Fuzz one target until the time is up or something comes through that is no error of ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", help="what reads the bytes; see --list")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--list", action="store_true", help="the targets")
    parser.add_argument("inputs", nargs="*", help="inputs to repeat")
    options = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["qwen3emb_launch"]):
        from fuzz_targets import TARGETS, samples, survives
    if options.list or options.target not in TARGETS:
        raise SystemExit("targets: " + ", ".join(TARGETS))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind in ("DATA", "STATE", "CACHE", "CONFIG"):
            os.environ[f"QWEN3EMB_{kind}_DIR"] = str(folder / kind.lower())
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, sample in enumerate(samples(options.target)):
            (corpus / str(number)).write_bytes(sample)
        work = folder / "work"
        work.mkdir()
        argv = [sys.argv[0], f"-max_total_time={options.seconds}", *(options.inputs or [str(corpus)])]
        atheris.Setup(
            argv, lambda data: None if survives(options.target, work, data) else sys.exit("no code or message")
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
