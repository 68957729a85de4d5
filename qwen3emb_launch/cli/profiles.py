"""`qwen3emb profiles`: what can be launched, why it is launched that way, and profiles of one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3emb_launch.cli import completion
from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.explain import Explanation
    from qwen3emb_launch.profile import Profile
    from qwen3emb_launch.profile_files import ProfileFile

NameArgument = Annotated[
    str,
    typer.Argument(
        help="A profile (h100), one of its variants (rtx4090:lean), or a file.",
        show_default=False,
        autocompletion=completion.profiles,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting, key=value; may be given again.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="List, explain, check and make launch profiles.", no_args_is_help=True)
    group.command("list", epilog="Example: qwen3emb profiles list --json")(list_)
    group.command(epilog="Example: qwen3emb profiles show rtx4090")(show)
    group.command(epilog="Example: qwen3emb profiles explain rtx4090:lean --model 8b --set context_length=8192")(
        explain
    )
    group.command(epilog="Example: qwen3emb profiles validate office rtx4090:lean ./mine.yaml")(validate)
    group.command(epilog="Example: qwen3emb profiles new office-4090 --from rtx4090 --model 0.6b")(new)
    app.add_typer(group, name="profiles")


def list_(json: JsonOption = False) -> None:
    """List the profiles, and which one is for the GPU of this machine."""
    with shell("profiles list", json) as console:
        from qwen3emb_launch import gpu, profile_files

        cards = gpu.inventory()
        rows = [_row(entry, cards) for entry in profile_files.available()]

        def human(c: Console) -> None:
            c.table(
                ("profile", "model", "evidence", "from", "description"),
                [(_marked(r), r["model"], r["evidence"], r["origin"], r["error"] or r["description"]) for r in rows],
            )
            if any(r["matches"] for r in rows):
                c.say("* matches a GPU of this machine")

        console.result(rows, human)


def _row(entry: ProfileFile, cards: list[Any]) -> dict[str, Any]:
    profile = entry.profile
    evidence = profile.evidence if profile else "none"
    return {
        "name": entry.name,
        "model": profile.model if profile else None,
        "description": profile.description if profile else None,
        "variants": list(profile.variants) if profile else [],
        "evidence": "none" if evidence == "none" else f"{len(evidence)} figures",
        "origin": entry.origin,
        "path": entry.path,
        "shadows": entry.shadows,
        "matches": bool(
            profile and profile.gpu and any(profile.gpu.matches(c.name, c.total_bytes / 2**30) for c in cards)
        ),
        "error": entry.error.message if entry.error else None,
    }


def _marked(row: dict[str, Any]) -> str:
    names = [row["name"], *(f"{row['name']}:{variant}" for variant in row["variants"])]
    return ("* " if row["matches"] else "") + ", ".join(names)


def show(name: NameArgument, json: JsonOption = False) -> None:
    """Print a profile: its file as it is written, or a variant as it resolves."""
    with shell("profiles show", json) as console:
        from qwen3emb_launch import profile_files

        profile = profile_files.load(name)
        base, variant = profile_files.split_variant(name)
        path = profile_files.find(base)

        def human(c: Console) -> None:
            if variant is None:
                c.text(profile_files.read(path).rstrip("\n"))
            else:
                import yaml

                c.text(yaml.safe_dump(profile.to_dict(), sort_keys=False, allow_unicode=True).rstrip("\n"))
            c.say(f"from {path}")

        console.result({**profile.to_dict(), "path": path}, human)


def explain(
    name: NameArgument,
    model: Annotated[
        str | None, typer.Option("--model", help="Another model than the profile's.", show_default=False)
    ] = None,
    set_: SetOption = None,
    engine: Annotated[str | None, typer.Option("--engine", help="This engine environment.", show_default=False)] = None,
    json: JsonOption = False,
) -> None:
    """Show every value that would be launched, who decided it and why; the memory it takes; and the command.

    Starts nothing and needs neither the GPU nor the engine nor the model: what is missing is assumed, and said.
    """
    with shell("profiles explain", json) as console:
        from qwen3emb_launch import profile_files
        from qwen3emb_launch.cli.launching import Chosen, LaunchOptions
        from qwen3emb_launch.explain import Ask, explain

        profile = profile_files.load(name)
        words = tuple(set_ or ())
        workers = Chosen(profile, None, "").gateway_workers(LaunchOptions(settings=words))
        ask = Ask(model, engine, words, dict(os.environ), workers)
        explained = explain(profile, ask)
        for warning in explained.plan.warnings:
            console.warn(warning)
        console.result(explained, lambda c: _show_explained(c, explained))


def _show_explained(console: Console, explained: Explanation) -> None:
    import shlex

    from qwen3emb_launch.planning.memory import arithmetic, gigabytes

    plan = explained.plan
    for note in explained.assumptions:
        console.say(f"assumed: {note}")
    rows = [(s.key, _value(s.value), s.origin, s.reason) for s in plan.settings]
    console.table(("setting", "value", "decided by", "because"), rows)
    if plan.memory:
        there = plan.memory.available_bytes
        console.text(
            "\nmemory, at worst: " + arithmetic(plan.memory) + (f" of {gigabytes(there)} free" if there else "")
        )
    console.text(
        "\ncommand:\n" + " ".join([*(f"{k}={shlex.quote(v)}" for k, v in plan.env.items()), shlex.join(plan.argv)])
    )
    if explained.evidence == "none":
        console.text("\nevidence: none. Nobody has measured this profile on its hardware yet.")
    else:
        console.text("\nevidence:")
        for one in explained.evidence:
            figure = f"{one['what']}: {one['value']:g} {one['unit']} on {one['hardware']}, {one['date']}"
            console.text(f"  {figure}; again by `{one['command']}`")


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def validate(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Profiles: names (h100), variants (rtx4090:lean) or files.",
            show_default=False,
            autocompletion=completion.profiles,
        ),
    ],
    json: JsonOption = False,
) -> None:
    """Check profiles: schema, engine options, combinations known to be bad, and that they fit their own GPU."""
    with shell("profiles validate", json) as console:
        from qwen3emb_launch.errors import InvalidInputError

        reports = [_report(name) for name in names]
        for report in reports:
            for problem in report["problems"]:
                console.say(problem)
        bad = [r["profile"] for r in reports if r["problems"]]
        if bad:
            error = InvalidInputError(
                "bad_profile", f"{len(bad)} of {len(reports)} profiles are not valid: {', '.join(bad)}",
                "docs/profiles.md explains the keys",
            )  # fmt: skip
            error.result = reports
            raise error
        console.result(reports, lambda c: c.text("\n".join(f"{r['profile']}: ok" for r in reports)))


def _report(name: str) -> dict[str, Any]:
    from qwen3emb_launch.errors import InvalidInputError
    from qwen3emb_launch.explain import problems_with
    from qwen3emb_launch.profile_text import VALIDATE_HINT

    try:
        profile = _named(name)
    except InvalidInputError as error:
        problems = error.message.splitlines()
        if error.hint != VALIDATE_HINT:
            problems[-1] += f" -> {error.hint}"
        return {"profile": name, "problems": problems}
    said = [f"{name}: {e.message}" + (f" -> {e.hint}" if e.hint else "") for e in problems_with(profile)]
    return {"profile": name, "problems": said}


def _named(name: str) -> Profile:
    """What `--profile` would take, and any other file: no name hides a file that nothing else is meant by."""
    from qwen3emb_launch import profile_files
    from qwen3emb_launch.errors import InvalidInputError
    from qwen3emb_launch.profile_text import parse_profile

    try:
        return profile_files.load(name)
    except InvalidInputError as error:
        if error.code not in ("unknown_profile", "profile_unreadable"):
            raise
        try:
            text = profile_files.read(Path(name))
        except InvalidInputError:
            raise error from None
    return parse_profile(text, name)


def new(
    name: Annotated[str, typer.Argument(help="What to call it.", show_default=False)],
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="Copy this profile. Default: the one for this machine's GPU, else cpu.", show_default=False
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model it launches.", show_default=False)] = None,
    json: JsonOption = False,
) -> None:
    """Make a profile of your own, as a copy to edit. It wins over a shipped one of the same name."""
    with shell("profiles new", json) as console:
        from qwen3emb_launch import profile_files

        path = profile_files.create(name, source=source or _for_this_machine(), model=model)
        console.result({"name": name, "path": path}, lambda c: c.text(str(path)))
        console.say(f"edit it, then: qwen3emb profiles validate {name}; qwen3emb up --profile {name}")


def _for_this_machine() -> str:
    from qwen3emb_launch import gpu, planning, profile_files

    cards = gpu.inventory()
    if not cards:
        return "cpu"
    matched = planning.match_profile(cards, profile_files.profiles())
    return matched.profile.name if matched.warning is None else "h100"
