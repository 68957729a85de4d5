"""`qwen3emb systemd`: endpoints that boot, restart and stop with the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.facts import LaunchPlan
    from qwen3emb_launch.systemd.installer import Installed, Removed, Written
    from qwen3emb_launch.systemd.manager import Manager
    from qwen3emb_launch.systemd.places import Places
    from qwen3emb_launch.systemd.spec import Wanted

SystemOption = Annotated[
    bool | None,
    typer.Option(
        "--system/--user", help="The machine's units, or your own. Default: --system for root.", show_default=False
    ),
]
RootOption = Annotated[
    Path | None, typer.Option(help="Work on the files below this folder only; systemd is not told.", show_default=False)
]
NameOption = Annotated[
    str | None, typer.Option(help="The instance's name. Default: the profile's.", show_default=False)
]
TemplateOption = Annotated[bool, typer.Option("--template", help="qwen3emb@.service: one unit for every profile.")]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", "-p", help="A profile's name or file. Default: the one for this GPU.")
]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="As of `qwen3emb up`.", show_default=False)]
HostOption = Annotated[str | None, typer.Option(help="Address to listen on. Default: this machine only.")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on. Default: the profile's.")]
EngineOption = Annotated[str | None, typer.Option(help="An engine environment by name.", show_default=False)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Let starts install and download what is missing; else they never do.")
]
CredentialOption = Annotated[
    list[str] | None,
    typer.Option("--credential", metavar="NAME=FILE", help="A secret file for LoadCredential=: api_keys, hf_token."),
]

# Settings whose values are files.
FILES = ("gateway.api_keys", "gateway.tasks", "gateway.disk_cache", "gateway.access_log")


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Units for systemd: boot, restart, watch and stop endpoints.", no_args_is_help=True)
    group.command(
        epilog="Examples: qwen3emb systemd show -p rtx4090   |   qwen3emb systemd show --system -p h100 --port 8000"
    )(show)
    group.command(
        epilog="Examples: qwen3emb systemd install --profile demo --now   |   "
        "sudo qwen3emb systemd install --profile h100 --port 8000   |   qwen3emb systemd install --template"
    )(install)
    group.command(epilog="Example: qwen3emb systemd uninstall --name demo")(uninstall)
    group.command(epilog="Example: qwen3emb systemd status --json")(status)
    app.add_typer(group, name="systemd")


def show(
    profile: ProfileOption = None,
    name: NameOption = None,
    system: SystemOption = None,
    template: TemplateOption = False,
    model: ModelOption = None,
    host: HostOption = None,
    port: PortOption = None,
    engine: EngineOption = None,
    settings: SetOption = None,
    download: DownloadOption = False,
    credential: CredentialOption = None,
    json: JsonOption = False,
) -> None:
    """Print the unit that `install` would write; nothing is needed for it, nothing is changed."""
    with shell("systemd show", json) as console:
        asked = _Asked(profile, name, model, host, port, engine, settings or [], download, credential or [])
        unit = _unit(_places(system, None), asked, template=template, console=console)
        console.result(
            {"unit": unit.name, "scope": unit.where.scope, "text": unit.text, "missing": unit.missing},
            lambda c: c.text(unit.text.rstrip("\n")),
        )


def install(
    profile: ProfileOption = None,
    name: NameOption = None,
    system: SystemOption = None,
    template: TemplateOption = False,
    model: ModelOption = None,
    host: HostOption = None,
    port: PortOption = None,
    engine: EngineOption = None,
    settings: SetOption = None,
    download: DownloadOption = False,
    credential: CredentialOption = None,
    enable: Annotated[bool, typer.Option("--enable/--no-enable", help="Start it at boot (--user: at login).")] = True,
    now: Annotated[bool, typer.Option("--now", help="Start it now, too.")] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Install the engine and download the model first, as the service's user.")
    ] = False,
    root: RootOption = None,
    json: JsonOption = False,
) -> None:
    """Write the unit and what goes with it, and enable it. Doing it again changes nothing."""
    with shell("systemd install", json) as console:
        import sys

        from qwen3emb_launch.systemd import installer

        asked = _Asked(profile, name, model, host, port, engine, settings or [], download, credential or [])
        where = _places(system, root)
        manager = _manager(where)
        if manager:
            manager.check()
            if where.scope == "system":
                installer.check_launcher(Path(sys.executable), Path(installer.__file__))

        def put(unit: _Unit, *, start: bool) -> Installed:
            return installer.install(
                unit.where, unit.name, unit.text, manager, cuda=unit.cuda, enable=enable, now=start
            )

        unit = _unit(where, asked, template=template, console=console)
        if fetch and unit.missing and manager:
            put(unit, start=False)  # the service's account comes with it
            _fetch(unit, console)
            unit = _unit(where, asked, template=template, console=console)
        ready = not unit.missing or download
        done = put(unit, start=now and ready)
        if not ready:
            console.warn(f"starts will fail without {' and '.join(unit.missing)}: repeat this with --fetch")
        console.result({**_plain(done), "missing": [] if ready else unit.missing}, lambda c: _show_installed(c, done))


def uninstall(
    name: Annotated[str | None, typer.Option(help="The instance. Default: the only one.", show_default=False)] = None,
    system: SystemOption = None,
    template: TemplateOption = False,
    root: RootOption = None,
    json: JsonOption = False,
) -> None:
    """Stop and disable the unit and remove every file that `install` wrote."""
    with shell("systemd uninstall", json) as console:
        from qwen3emb_launch.systemd import installer, places

        where = _places(system, root)
        unit = places.TEMPLATE if template else _named(where, name)
        done = installer.uninstall(where, unit, _manager(where))
        console.result(done, lambda c: _show_removed(c, done))


def status(system: SystemOption = None, json: JsonOption = False) -> None:
    """Show every unit of qwen3emb, with what systemd says of it."""
    with shell("systemd status", json) as console:
        from qwen3emb_launch.systemd import installer
        from qwen3emb_launch.systemd.manager import Manager

        where = _places(system, None)
        rows = installer.status(where, Manager(where.scope)) if installer.installed(where) else []
        console.result({"units": rows}, lambda c: _show_status(c, rows))


# ---- what is asked for -------------------------------------------------------------------------------------------


class _Asked:
    """The options of `show` and `install`, with paths made absolute: a service has no current folder."""

    def __init__(
        self,
        profile: str | None,
        name: str | None,
        model: str | None,
        host: str | None,
        port: int | None,
        engine: str | None,
        settings: list[str],
        download: bool,
        credentials: list[str],
    ) -> None:
        from qwen3emb_launch.errors import InvalidInputError

        self.profile = str(Path(profile).expanduser().absolute()) if profile and _is_file(profile) else profile
        self.model = str(Path(model).expanduser().absolute()) if model and Path(model).expanduser().is_dir() else model
        self.name, self.host, self.port, self.engine = name, host, port, engine
        self.settings, self.download = [_absolute(word) for word in settings], download
        self.credentials: dict[str, str] = {}
        for word in credentials:
            key, equals, path = word.partition("=")
            if not equals or not path:
                raise InvalidInputError(
                    "bad_credential", f"--credential {key}: NAME=FILE", "--credential hf_token=/etc/qwen3emb/hf_token"
                )
            self.credentials[key] = str(Path(path).expanduser().absolute())


def _absolute(word: str) -> str:
    """A setting that names a file, with the path that it has here."""
    key, equals, value = word.partition("=")
    if key not in FILES or not value or value == "-":
        return word
    return f"{key}{equals}{Path(value).expanduser().absolute()}"


def _is_file(profile: str) -> bool:
    return "/" in profile or profile.endswith((".yaml", ".yml"))


class _Unit:
    """A unit ready to be written. `missing` names what a start would not find."""

    def __init__(
        self, where: Places, name: str, text: str, cuda: bool, missing: list[str], plan: LaunchPlan | None
    ) -> None:
        self.where, self.name, self.text, self.cuda, self.missing, self.plan = where, name, text, cuda, missing, plan


def _unit(where: Places, asked: _Asked, *, template: bool, console: Console) -> _Unit:
    """Plan as the service will, with what is here; what is not is assumed, and named in the unit's head."""
    from qwen3emb_launch import gpu
    from qwen3emb_launch.systemd import places, spec

    if where.scope == "system":
        os.environ.update(places.SYSTEM_FOLDERS)  # profiles, engines and models are looked up where the service will
    if template:
        cuda = bool(gpu.inventory())
        text = spec.text(spec.template(where.scope, os.environ, cuda=cuda))
        return _Unit(where, places.TEMPLATE, text, cuda, [], None)
    wanted, plan, notes = _plan(where, asked, console)
    service = spec.service(wanted, plan, os.environ)
    for note in notes:
        console.say(note)
    return _Unit(where, places.unit_name(wanted.instance), spec.text(service), service.cuda, _missing(plan), plan)


def _missing(plan: LaunchPlan) -> list[str]:
    """What a start that may not download would not find. The demo model is made where it is missing."""
    found = [] if plan.engine.python.is_absolute() else [f"the {plan.engine.flavour} engine environment"]
    return found if plan.model.source == "demo" or plan.model.path.is_dir() else [*found, f"model {plan.model.name}"]


def _plan(where: Places, asked: _Asked, console: Console) -> tuple[Wanted, LaunchPlan, tuple[str, ...]]:
    from qwen3emb_launch import profile_files
    from qwen3emb_launch.cli.launching import Chosen, LaunchOptions, choose, with_gateway
    from qwen3emb_launch.explain import Ask, explain
    from qwen3emb_launch.state import check_name
    from qwen3emb_launch.systemd.spec import API_KEYS, Wanted

    wanted = asked.profile or ("demo" if asked.model == "demo" else None)
    profile = profile_files.load(wanted) if wanted else choose(LaunchOptions(), console).profile
    address = [f"server.{k}={v}" for k, v in (("host", asked.host), ("port", asked.port)) if v is not None]
    # The service will find them elsewhere; whether they can be used shows here.
    keys = [f"gateway.api_keys={asked.credentials[API_KEYS]}"] if API_KEYS in asked.credentials else []
    environ = {} if where.scope == "system" else dict(os.environ)
    words = (*asked.settings, *address, *keys)
    workers = Chosen(profile, None, "").gateway_workers(LaunchOptions(settings=words), environ)
    found = explain(profile, Ask(asked.model, asked.engine, words, environ, workers))
    for warning in found.plan.warnings:
        console.warn(warning)
    with_gateway(found.plan)  # what the gateway would refuse at each start is refused here
    known = wanted or (profile.name if profile.name != "generic" else None)
    return (
        Wanted(
            scope=where.scope,
            instance=check_name(asked.name or profile.name.replace(":", "-")),
            profile=known,
            model=asked.model,
            host=asked.host,
            port=asked.port,
            engine=asked.engine,
            settings=asked.settings,
            download=asked.download,
            credentials=asked.credentials,
        ),
        found.plan,
        found.assumptions,
    )


def _fetch(unit: _Unit, console: Console) -> None:
    """Install and download as the service's own user, into the service's own folders."""
    import subprocess
    import sys

    from qwen3emb_launch.errors import CheckFailedError
    from qwen3emb_launch.systemd import places

    assert unit.plan is not None  # noqa: S101 - a template has nothing missing
    steps = [["engine", "install", unit.plan.engine.flavour]]
    if unit.plan.model.source not in ("demo", "folder"):
        steps.append(["download", unit.plan.model.catalog_key or unit.plan.model.name])
    user: dict[str, Any] = {}
    if unit.where.scope == "system":
        user = {"user": places.USER, "group": places.USER, "extra_groups": [], "cwd": "/"}
    environ = {**os.environ, "HOME": places.HOME} if user else dict(os.environ)
    for step in steps:
        words = [sys.executable, "-P", "-m", "qwen3emb_launch", *step]
        console.say(f"as {places.USER if user else 'you'}: qwen3emb {' '.join(step)}")
        done = subprocess.run(words, env=environ, stdout=sys.stderr, **user)
        if done.returncode != 0:
            raise CheckFailedError(
                "fetch_failed", f"`qwen3emb {' '.join(step)}` ended with status {done.returncode}", "see above"
            )


def _places(system: bool | None, root: Path | None) -> Places:
    from qwen3emb_launch.systemd.places import Places

    wanted = os.geteuid() == 0 if system is None else system
    return Places("system" if wanted else "user", (root or Path("/")).absolute())


def _manager(where: Places) -> Manager | None:
    """systemd, unless only files below another root are meant."""
    from qwen3emb_launch.systemd.manager import Manager

    return Manager(where.scope) if where.root == Path("/") else None


def _named(where: Places, name: str | None) -> str:
    from qwen3emb_launch.errors import InvalidInputError
    from qwen3emb_launch.state import check_name
    from qwen3emb_launch.systemd import installer, places

    if name is not None:
        return places.unit_name(check_name(name))
    found = installer.installed(where)
    if len(found) != 1:
        there = ", ".join(found) or "none"
        raise InvalidInputError(
            "which_unit", f"say which unit to remove; there are: {there}", "qwen3emb systemd uninstall --name NAME"
        )
    return found[0]


# ---- what is shown -----------------------------------------------------------------------------------------------


def _plain(done: Installed) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(done)


def _show_files(console: Console, files: tuple[Written, ...]) -> None:
    for file in files:
        console.text(f"{file.did:<9}  {file.path}")


def _show_installed(console: Console, done: Installed) -> None:
    _show_files(console, done.files)
    if done.enabled:
        console.text(f"enabled    {done.unit}")
    for note in done.notes:
        console.say(note)


def _show_removed(console: Console, done: Removed) -> None:
    if not done.files:
        console.text(f"{done.unit} is not installed")
    _show_files(console, done.files)
    for note in done.notes:
        console.say(note)


def _show_status(console: Console, rows: list[dict[str, Any]]) -> None:
    if not rows:
        console.say("no unit is installed: qwen3emb systemd install")
        return
    console.table(
        ("UNIT", "ACTIVE", "ENABLED", "PID", "RESTARTS", "SAYS"),
        [(r["unit"], f"{r['active']} ({r['sub']})", r["enabled"], r["pid"], r["restarts"], r["says"]) for r in rows],
    )
    for row in rows:
        if row["needs_reload"]:
            console.warn(f"{row['unit']} was changed on disk: systemctl daemon-reload")
