"""`python -m qwen3emb_engine_plugin.serve ARGUMENTS`: sglang.launch_server with its arguments, ready sooner.

Before SGLang's own main begins, the weights begin to be read (`readahead`), only the model classes that the checkpoint
needs are let in, everything is imported once, from bytecode that is kept where Python keeps none (`bytecode`) and
without packages that nothing here calls (`unused`), the tokenizer is loaded once (`one_tokenizer`), and a template of
the process is forked for the workers (`template`). QWEN3EMB_PLUGIN_READAHEAD=0, _BYTECODE=0, _UNUSED=0 and _TOKENIZER=0
leave one of them out, _TEMPLATE=0 the template and the latter two, QWEN3EMB_PLUGIN=0 everything.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import pkgutil
import runpy
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from qwen3emb_engine_plugin import bytecode, one_tokenizer, readahead, unused
from qwen3emb_engine_plugin.switches import misfit_of_version, switched_on

logger = logging.getLogger("qwen3emb_engine_plugin")

DISABLED = "SGLANG_DISABLED_MODEL_ARCHS"  # SGLang's own: modules of sglang.srt.models that are not imported
QWEN3 = "Qwen3ForCausalLM"
NEEDED = {"qwen3", "qwen2", "transformers", "registry", "utils"}
CLASSES_OF_QWEN3 = "sglang.srt.models.qwen3"
# What an import here has and a stock one has not, for the start that follows one that failed.
PLAIN_IMPORT = {f"QWEN3EMB_PLUGIN_{part}": "0" for part in ("TEMPLATE", "UNUSED", "BYTECODE")}


def main() -> None:
    """Prepare, then hand over to `python -m sglang.launch_server`."""
    # It finds the argument vector, which a worker's title overwrites, only while the environment is as it was at exec.
    import setproctitle  # noqa: F401

    as_started = dict(os.environ)
    if switched_on(None) and chosen() and not misfit_of_version():
        if switched_on("bytecode"):
            _say("bytecode", bytecode.keep())
        reader = read_ahead()
        config = checkpoint(sys.argv[1:])
        leave_out_models(config)
        if switched_on("template"):
            try:
                _say("template", import_once(config))
            except Exception as error:
                # Whatever it is would end each start anew, and SGLang's own way of importing may well not meet it.
                logger.warning("qwen3emb plugin: starts anew without a template: %s: %s", type(error).__name__, error)
                start_anew(as_started, reader)
        if reader:
            readahead.reap(reader)
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def import_once(config: Mapping[str, Any]) -> str | None:
    """Import everything, load the tokenizer and fork the template; why there is no template, or None."""
    # numpy's and scipy's own threads, which nothing here uses: the template has to be without any.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from qwen3emb_engine_plugin import template

    lean = switched_on("unused") and unused.fits(config, sys.argv[1:])
    # SGLang's registry only logs a class that cannot be imported, and the scheduler then dies for want of it.
    asked_for = (CLASSES_OF_QWEN3,) if config.get("architectures") == [QWEN3] else ()
    return template.start(
        modules=(*template.MODULES, *asked_for),
        load=load_tokenizer,
        importing=unused.said_to_be_missing if lean else nullcontext,
    )


def start_anew(environ: Mapping[str, str], reader: int | None) -> None:
    """The same command in this process, under `environ`, with a plain import. That one, failing, fails for good."""
    if reader:
        readahead.stop(reader)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environ, **PLAIN_IMPORT})  # noqa: S606 - our own command


def _say(part: str, problem: str | None) -> None:
    """What SGLang's log is for: it sets up logging later, and until then warnings go to stderr as they are."""
    if problem:
        logger.warning("qwen3emb plugin: %s stands aside: %s", part, problem)


def read_ahead() -> int | None:
    """The process that reads the weights meanwhile, where that is of use."""
    folder = model_folder(sys.argv[1:])
    wanted = switched_on("readahead", readahead.cores_to_spare()) and folder and "--load-format" not in sys.argv
    return readahead.start(folder) if wanted and folder else None


def load_tokenizer() -> None:
    """Load the tokenizer that the workers will ask for, if it is plain which one that is."""
    folder = one_tokenizer.folder_asked_for(sys.argv[1:]) if switched_on("tokenizer") else None
    if folder:
        try:
            problem = one_tokenizer.load(folder)
        except Exception as error:  # a file that cannot be read is reported by the workers, as it always was
            problem = f"{type(error).__name__}: {error}"
        _say("tokenizer", problem)


def chosen() -> bool:
    """Whether SGLang's own list of plugins, where there is one, lets this one in."""
    names = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    return not names or "qwen3emb" in names


def leave_out_models(config: Mapping[str, Any]) -> None:
    """Let SGLang import the classes of Qwen3 alone: it imports all of some 200 models otherwise.

    Only for a checkpoint that says it is a Qwen3ForCausalLM, and where nobody has set the list.
    """
    if DISABLED in os.environ or config.get("architectures") != [QWEN3]:
        return
    spec = importlib.util.find_spec("sglang")
    folders = [str(Path(place) / "srt" / "models") for place in (spec.submodule_search_locations or ())] if spec else []
    names = {module.name for module in pkgutil.iter_modules(folders)}
    if names >= {"qwen3", "registry"}:
        os.environ[DISABLED] = ",".join(sorted(names - NEEDED))


def checkpoint(arguments: Sequence[str]) -> dict[str, Any]:
    """The model folder's config.json; empty where that cannot be read."""
    folder = model_folder(arguments)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def model_folder(arguments: Sequence[str]) -> Path | None:
    """The folder after --model-path; None for a hub's name, which SGLang resolves later."""
    for position, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name in ("--model-path", "--model"):
            folder = value if equals else "".join(arguments[position + 1 : position + 2])
            return Path(folder) if folder and (Path(folder) / "config.json").is_file() else None
    return None


if __name__ == "__main__":
    main()
