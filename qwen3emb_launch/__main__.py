"""`python -m qwen3emb_launch` and the `qwen3emb` script."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the exit status is the command's."""
    from qwen3emb_launch.cli.app import run

    raise SystemExit(run())


if __name__ == "__main__":
    main()
