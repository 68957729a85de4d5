"""`qwen3emb diff`: may the vectors of two endpoints share an index?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli.shell import JsonOption, shell
from qwen3emb_launch.cli.verify import KeyFileOption, KeyOption, read_key, target

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.verify.diff import Difference


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: qwen3emb diff old new · qwen3emb diff demo http://127.0.0.1:30001/v1 · "
        "qwen3emb diff saved.json https://api.example.com/v1 --api-key-file key"
    )(diff)


def diff(
    a: Annotated[str, typer.Argument(help="An instance, a URL ending in /v1, or a set saved by verify.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    model_a: Annotated[str | None, typer.Option("--model-a", help="Model id to send to A.")] = None,
    model_b: Annotated[str | None, typer.Option("--model-b", help="Model id to send to B.")] = None,
    api_key: KeyOption = None,
    api_key_file: KeyFileOption = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one request.")] = 60.0,
    json: JsonOption = False,
) -> None:
    """Say whether the vectors of A and B may share an index.

    The same texts are embedded at both: distances text by text, what searches find, and where the fingerprints
    differ. Exit 0 when they may share one, 1 when not.
    """
    with shell("diff", json) as console:
        from dataclasses import replace

        from qwen3emb_launch.errors import CheckFailedError
        from qwen3emb_launch.verify.diff import compare_sets
        from qwen3emb_launch.verify.reference import ReferenceSet, load
        from qwen3emb_launch.verify.runner import vectors_for_diff
        from qwen3emb_launch.verify.session import Options
        from qwen3emb_launch.verify.texts import ALL
        from qwen3emb_launch.verify.tolerance import ASSUMED_LAYERS, Precision, canonical_dtype

        key = read_key(console, api_key, api_key_file)
        saved = {side: load(Path(side)) for side in (a, b) if is_file(side)}
        texts = tuple(t for t in ALL if all(t in s.vectors for s in saved.values()))

        def side(which: str, model: str | None) -> tuple[ReferenceSet, Precision]:
            if which in saved:
                found = saved[which]
                return found, Precision(canonical_dtype(found.dtype) or "bfloat16", "as saved", ASSUMED_LAYERS)
            url = which if "://" in which else None
            request = target(console, None if url else which, url, Options(), api_key=key, timeout=timeout)
            return vectors_for_diff(replace(request, model=model), texts or ALL)

        with console.progress("diff") as progress:
            progress.step(a)
            (left, one) = side(a, model_a)
            progress.step(b)
            (right, other) = side(b, model_b)
        # A saved set does not say how deep its model is; the other side's word is better than the assumption.
        allowed = min(one.distance, other.distance) + max(one.distance, other.distance)
        if a in saved or b in saved:
            allowed = 2 * (other.distance if a in saved else one.distance)
        result = compare_sets(left, right, allowed)
        if not result.may_share:
            error = CheckFailedError(
                "other_vectors",
                f"{a} and {b} may not share an index: {result.reason}",
                "embed the documents again with the one you keep, or serve the same model the same way",
            )
            error.result = result
            if not console.json:
                show(console, result)
            raise error
        console.result(result, lambda out: show(out, result))


def is_file(which: str) -> bool:
    """Whether a side is a saved set: a path, not an instance's name or a URL."""
    return "://" not in which and (which.endswith(".json") or "/" in which)


def show(out: Console, result: Difference) -> None:
    """Distances, searches, fingerprints, verdict."""

    def number(value: float | None, form: str = ".4f") -> str | None:
        return None if value is None else format(value, form)

    out.fields(
        [
            ("A", f"{result.a}, {result.width[0]} dims"),
            ("B", f"{result.b}, {result.width[1]} dims"),
            ("texts", result.texts),
            *((f"cosine {k}", number(v, ".6f")) for k, v in result.cosine.items()),
            ("furthest text", result.furthest),
            ("rank correlation", number(result.spearman)),
            ("top 10 in common", number(result.overlap)),
            ("top 10, A's queries on B's documents", number(result.mixed_overlap)),
            ("same first", number(result.top1)),
            ("fingerprints", f"{result.fingerprints.get('a')}  {result.fingerprints.get('b')}"),
        ]
    )
    for key, sides in result.fingerprint_differences.items():
        out.text(f"  {key}: {sides['a']} | {sides['b']}")
    word = {"same": "may share an index", "close": "may share an index, with care", "other": "may NOT share an index"}
    out.text(f"{word[result.verdict]}: {result.reason}")
