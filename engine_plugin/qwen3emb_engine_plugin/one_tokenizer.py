"""The tokenizer loaded once, before the workers are forked.

SGLang loads it in each of its three processes, in the scheduler's twice, and each time reads its file of 11 MB four
times over. Here the template holds it, and the calls that ask for just this one are given it; an embedding server only
encodes with it. Reading it starts no threads; whether any run is looked at before the fork.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen3emb_engine_plugin.switches import misfit

MANAGERS = "sglang.srt.managers"
PLACES = tuple(f"{MANAGERS}.{name}" for name in ("tokenizer_manager", "scheduler", "tp_worker", "detokenizer_manager"))
PARAMETERS = "tokenizer_name args tokenizer_mode trust_remote_code tokenizer_revision tokenizer_backend kwargs"
# What each place passes where no option says otherwise.
ASKED: dict[str, Any] = {
    "tokenizer_mode": "auto", "trust_remote_code": False, "revision": None, "tokenizer_backend": "huggingface",
}  # fmt: skip
# With any of these another tokenizer is asked for, or none, or it may be changed after it is loaded.
OTHERWISE = (
    "--tokenizer-mode", "--trust-remote-code", "--revision", "--tokenizer-backend", "--skip-tokenizer-init", "--config",
    "--chat-template", "--hf-chat-template-name", "--tokenizer-worker-num", "--enable-multimodal",
)  # fmt: skip
Loader = Callable[..., Any]


def folder_asked_for(arguments: Sequence[str]) -> str | None:
    """The folder whose tokenizer these arguments ask for by default; None if they ask for anything special."""
    words = [word.partition("=")[0] for word in arguments]
    if "--is-embedding" not in words or set(words) & set(OTHERWISE):
        return None
    for names in (("--tokenizer-path",), ("--model-path", "--model")):
        found = [_value(arguments, place) for place, word in enumerate(words) if word in names]
        if found:
            # What sglang makes of a name that is no folder (a hub id, a .gguf) is its own affair.
            return found[-1] if (Path(found[-1]) / "tokenizer.json").is_file() else None
    return None


def _value(arguments: Sequence[str], place: int) -> str:
    _, equals, value = arguments[place].partition("=")
    return value if equals else "".join(arguments[place + 1 : place + 2])


def load(folder: str) -> str | None:
    """Load it now and have it handed out wherever it is asked for. Returns why that is not done, or None."""
    modules = [importlib.import_module(name) for name in PLACES]
    loaders = {module.get_tokenizer for module in modules}
    if len(loaders) != 1:
        return "get_tokenizer is not one function everywhere"
    loader = loaders.pop()
    problem = misfit(loader, PARAMETERS)
    if problem:
        return problem
    tokenizer = loader(folder, **ASKED)
    if not getattr(tokenizer, "is_fast", False):
        return f"{type(tokenizer).__name__} is no fast tokenizer"
    handed_out = handing_out(loader, folder, tokenizer)
    for module in modules:
        module.get_tokenizer = handed_out  # type: ignore[attr-defined]
    return None


def handing_out(loader: Loader, folder: str, tokenizer: Any) -> Loader:
    """`loader`, but for the call that asks for just this tokenizer."""

    @functools.wraps(loader)
    def get_tokenizer(*args: Any, **kwargs: Any) -> Any:
        return tokenizer if args == (folder,) and kwargs == ASKED else loader(*args, **kwargs)

    return get_tokenizer
