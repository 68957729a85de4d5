"""`python -m qwen3emb_engine_plugin.serve ARGUMENTS`: sglang.launch_server with its arguments, ready sooner.

Before SGLang's own main begins, only the model classes that the checkpoint needs are let in, everything is imported
once, and a template of the process is forked for the workers (`template`). QWEN3EMB_PLUGIN_TEMPLATE=0 leaves that out,
QWEN3EMB_PLUGIN=0 everything.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen3emb_engine_plugin.switches import misfit_of_version, switched_on

logger = logging.getLogger("qwen3emb_engine_plugin")

DISABLED = "SGLANG_DISABLED_MODEL_ARCHS"  # SGLang's own: modules of sglang.srt.models that are not imported
QWEN3 = "Qwen3ForCausalLM"
NEEDED = {"qwen3", "qwen2", "transformers", "registry", "utils"}


def main() -> None:
    """Prepare, then hand over to `python -m sglang.launch_server`."""
    # It finds the argument vector, which a worker's title overwrites, only while the environment is as it was at exec.
    import setproctitle  # noqa: F401

    if switched_on(None) and chosen() and not misfit_of_version():
        leave_out_models(sys.argv[1:])
        if switched_on("template"):
            # numpy's and scipy's own threads, which nothing here uses: the template has to be without any.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            from qwen3emb_engine_plugin import template

            problem = template.start()
            if problem:
                # SGLang sets up logging later; until then warnings go to stderr as they are.
                logger.warning("qwen3emb plugin: template stands aside: %s", problem)
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def chosen() -> bool:
    """Whether SGLang's own list of plugins, where there is one, lets this one in."""
    names = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    return not names or "qwen3emb" in names


def leave_out_models(arguments: Sequence[str]) -> None:
    """Let SGLang import the classes of Qwen3 alone: it imports all of some 200 models otherwise.

    Only for a checkpoint that says it is a Qwen3ForCausalLM, and where nobody has set the list.
    """
    if DISABLED in os.environ or architectures(arguments) != [QWEN3]:
        return
    spec = importlib.util.find_spec("sglang")
    folders = [str(Path(place) / "srt" / "models") for place in (spec.submodule_search_locations or ())] if spec else []
    names = {module.name for module in pkgutil.iter_modules(folders)}
    if names >= {"qwen3", "registry"}:
        os.environ[DISABLED] = ",".join(sorted(names - NEEDED))


def architectures(arguments: Sequence[str]) -> list[str]:
    """What the config.json of the folder after --model-path names; empty where that cannot be read."""
    for position, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name in ("--model-path", "--model"):
            folder = value if equals else "".join(arguments[position + 1 : position + 2])
            try:
                found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["architectures"]
            except (OSError, ValueError, KeyError, TypeError):
                return []
            return found if isinstance(found, list) else []
    return []


if __name__ == "__main__":
    main()
