"""The `qwen3emb` application: which commands there are, and how the process ends."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated

import typer
from typer.exceptions import TyperException

from qwen3emb_launch import __version__
from qwen3emb_launch.cli.program_help import ProgramGroup
from qwen3emb_launch.console import Console, escape_what_the_locale_lacks
from qwen3emb_launch.errors import CheckFailedError, Exit, InterruptedByUser, InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.variables import mistaken

# One module a command (or group), in the order of `--help`. Each has `register(app)`. The sentence is the first of the
# command's own help (a test compares), so that the program's help need not import them all.
COMMANDS: dict[str, str] = {
    "up": "Serve an embedding model: fetch what is missing, start engine and gateway, prove them, keep them alive.",
    "status": "Show the instances: state, model, address, uptime, restarts, pid.",
    "logs": "Show what the engine wrote, or another part of the instance.",
    "restart": "Replace the engines of a running instance one after the other; requests go on meanwhile.",
    "down": "Stop an instance: running requests are answered first, then nothing of it is left.",
    "embed": 'Embed texts: a JSON line each, {"index", "text", "embedding"}, in their order.',
    "profiles": "List, explain, check and make launch profiles.",
    "download": "Download a model: only what serving needs, resumed where it stopped, every hash checked.",
    "models": "List, show, verify and remove models.",
    "engine": "Install, list, check and remove the environments that SGLang lives in.",
    "upgrade": "Move a running instance to another engine environment, without losing a request.",
    "verify": "Prove an endpoint's vectors right: an instance of qwen3emb, or any OpenAI-compatible one.",
    "diff": "Say whether the vectors of A and B may share an index.",
    "bench": "Measure an endpoint: throughput, latency, errors, energy.",
    "tune": "Try launch settings, each proven and measured, and write the best as a profile with its evidence.",
    "cost": "Cost per 1,000 calls, per 1M tokens and per month, each step shown; break-even against API prices.",
    "gateway": "Serve one OpenAI-compatible address before one or more engines: cached, batched, guarded, retried.",
    "doctor": "Check driver, GPU, engine, models, disk, ports, limits, network, clock and running servers.",
    "systemd": "Units for systemd: boot, restart, watch and stop endpoints.",
}

EPILOG = "Start here: qwen3emb up --profile demo (no GPU needed), or qwen3emb up (the profile that fits your GPU)."


def _version(value: bool) -> None:
    if value:
        Console("version").raw(f"qwen3emb {__version__}")
        raise typer.Exit


def build(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The application with every command registered, or only those that this run can need."""
    app = _root()
    for name in commands:
        import_module(f"qwen3emb_launch.cli.{name}").register(app)
    _unwrap(app)
    return app


def _unwrap(app: typer.Typer) -> None:
    """Make each paragraph of a help text one line, for the terminal to wrap: Typer keeps line ends behind the first."""
    for command in app.registered_commands:
        text = inspect.cleandoc(command.help or (command.callback and command.callback.__doc__) or "")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    for group in app.registered_groups:
        if group.typer_instance:
            _unwrap(group.typer_instance)


def outline() -> typer.Typer:
    """The same commands by name and first sentence only: enough for the program's own help, and built in no time."""
    app = _root()
    for name, sentence in COMMANDS.items():
        app.command(name, help=sentence)(lambda: None)
    return app


def _root() -> typer.Typer:
    app = typer.Typer(
        name="qwen3emb",
        cls=ProgramGroup,
        help="One command from nothing to a Qwen3-Embedding endpoint on SGLang: proven, tuned, kept alive, costed.",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """One command from nothing to a Qwen3-Embedding endpoint on SGLang: proven, tuned, kept alive, costed."""

    return app


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status. Usage errors take the same form as every other error."""
    args = list(sys.argv[1:] if argv is None else argv)
    console = Console(_command_of(args), json=any(a.split("=", 1)[0] == "--json" for a in args))
    escape_what_the_locale_lacks()
    try:
        for warning in mistaken(os.environ):
            console.warn(warning)
        status = _app_for(args)(args=args, prog_name="qwen3emb", standalone_mode=False)
        if status == Exit.INTERRUPTED and not isinstance(status, Exit):  # Typer's own word, outside a command's body
            raise KeyboardInterrupt
        return int(status or 0)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except TyperException as usage:
        message = usage.format_message()
        if message:  # empty when bare `qwen3emb` has just printed its help
            console.failure(InvalidInputError("usage", message, _help_for(args)))
        return int(Exit.INVALID)
    except LaunchError as error:
        console.failure(error, error.result)
        return int(error.exit)
    except (KeyboardInterrupt, typer.Abort):
        console.failure(InterruptedByUser())
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.FAILED)
    except PermissionError as error:  # a folder that no adapter expected to be closed: the user's to open
        where = error.filename or "a file or folder"
        hint = f"whose is it: ls -ld {where}; QWEN3EMB_STATE_DIR, _DATA_DIR, _CACHE_DIR, _CONFIG_DIR move our folders"
        console.failure(UnfitError("no_permission", f"{where} may not be used: {error.strerror}", hint))
        return int(Exit.UNFIT)
    except Exception as error:  # noqa: BLE001 - a defect of this program: its place for us, the promised form for the user
        traceback.print_exc()
        what = f"unexpected {type(error).__name__}: {error}"
        console.failure(
            CheckFailedError("internal_error", what, "a defect of qwen3emb: report it with the lines above")
        )
        return int(Exit.FAILED)


def _app_for(args: Sequence[str]) -> typer.Typer:
    """The least that can answer `args`: to import and build every command takes longer than most of them run."""
    if "_QWEN3EMB_COMPLETE" in os.environ:  # the shell asks for completions: the words come in the environment
        return build()
    return build(args[:1]) if args and args[0] in COMMANDS else outline()


def _help_for(args: Sequence[str]) -> str:
    """The help to read after a mistake: the command's, the program's when there is no such command."""
    words = _command_of(args).split()
    return " ".join(["qwen3emb", *(words if words and words[0] in COMMANDS else []), "--help"])


def _command_of(args: Sequence[str]) -> str:
    """The command's words, for the envelope: `engine install`."""
    words = []
    for arg in args:
        if arg.startswith("-"):
            break
        words.append(arg)
        if len(words) == 2 or words[0] not in GROUPS:
            break
    return " ".join(words)


GROUPS = frozenset({"engine", "models", "profiles", "systemd", "bench", "deploy"})
