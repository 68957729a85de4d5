"""What is wrong with an SGLang command for embeddings: of a running process, a script, or an article. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qwen3emb_launch import argv
from qwen3emb_launch.argv import Option
from qwen3emb_launch.catalog import CATALOG, CatalogModel, ModelShape
from qwen3emb_launch.doctor.report import Check, fail, unknown, warn
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import EngineFlag
from qwen3emb_launch.planning.known_bad import KNOWN_BAD, Combination, KnownBad

MODULE = argv.STOCK_MODULE
MODULES = (MODULE, argv.PLUGIN_MODULE)
NO_SUCH_MODULES = ("sglang.srt.server",)
EVERYWHERE = ("0.0.0.0", "::", "")
# Where the nearest spelling is not what is meant.
BETTER = {
    ("--kv-cache-dtype", ("fp8",)): "--kv-cache-dtype fp8_e4m3, which every backend reads",
    ("--enable-prompt-trust-remote-code", ()): "leave it out: no release has it, and the models bring no code",
}
SECRETS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")


@dataclass(frozen=True)
class Launch:
    """A command that starts SGLang. `version` and `flags` are its engine's, None where they are not known.

    `running`: it is a process that has passed the engine's own parser.
    """

    options: Mapping[str, Option]
    module: str
    version: str | None = None
    flags: Mapping[str, EngineFlag] | None = None
    shape: ModelShape | None = None
    running: bool = False

    @property
    def model(self) -> str:
        """The model's path or name; empty when none is given."""
        given = self.options.get("--model-path") or self.options.get("--model")
        return given.values[0] if given and given.values else ""

    @property
    def embeds(self) -> bool:
        """Whether it means to serve embeddings, by its flags or its model's name."""
        return "--is-embedding" in self.options or "embedding" in self.model.lower()

    def value(self, flag: str) -> str | None:
        """The first value of an option."""
        found = self.options.get(flag)
        return found.values[0] if found and found.values else None


def read(words: Sequence[str]) -> Launch | None:
    """The launch in a command line, whatever stands before it (env, numactl, docker run …); None when there is none."""
    for index, word in enumerate(words):
        if word in (*MODULES, *NO_SUCH_MODULES) and index and words[index - 1] == "-m":
            return Launch(_options(words[index + 1 :]), word)
        if PurePath(word).name == "sglang" and words[index + 1 : index + 2] == ["serve"]:
            return Launch(_options(words[index + 2 :]), MODULE)
    return None


def split(text: str) -> list[str]:
    """A pasted command as words; line ends after a backslash are understood. InvalidInputError `bad_command`."""
    try:
        return shlex.split(text.replace("\\\n", " ").replace("\\\r\n", " "), comments=True)
    except ValueError as error:
        raise InvalidInputError("bad_command", f"this is no command line: {error}", "quote it as a whole") from None


def _options(words: Sequence[str]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    last = ""
    for word in words:
        if word.startswith("--"):
            last, equals, value = word.partition("=")
            found[last] = Option(last, (value,) if equals else ())
        elif last:
            found[last] = Option(last, (*found[last].values, word))
    return found


def judge(launch: Launch, name: str) -> list[Check]:
    """Everything wrong with it; empty when nothing is known to be. No value of a secret option is shown."""
    if launch.module in NO_SUCH_MODULES:
        return [fail(name, f"no SGLang has a module {launch.module}", f"python -m {MODULE} …, or: qwen3emb up")]
    return [
        *_flags(launch, name),
        *_embedding(launch, name),
        *_combinations(launch, name),
        *_exposure(launch, name),
    ]


def _flags(launch: Launch, name: str) -> list[Check]:
    """Options that do not exist, and values that are none."""
    if launch.flags is None or launch.running:
        return []
    found = []
    origin = f"sglang {launch.version}" if launch.version else "this command"
    for option in launch.options.values():
        if option.flag in SECRETS or _abbreviates(option.flag, launch.flags):
            continue
        try:
            argv.check(option, launch.flags, origin)
        except InvalidInputError as error:
            mend = BETTER.get((option.flag, option.values), error.hint)
            found.append(fail(name, f"{error.message}: the engine exits with status 2", mend))
    return found


def _abbreviates(flag: str, flags: Mapping[str, EngineFlag]) -> bool:
    """argparse takes an unambiguous beginning of an option for the option."""
    return flag not in flags and sum(known.startswith(flag) for known in flags) == 1


def _embedding(launch: Launch, name: str) -> list[Check]:
    found = []
    if "--is-embedding" not in launch.options:
        found.append(
            fail(
                name,
                "--is-embedding is missing: the checkpoint calls itself Qwen3ForCausalLM, so every embedding request "
                "is answered 400",
                "add --is-embedding, or: qwen3emb up",
            )
        )
    override = launch.value("--json-model-override-args") or ""
    if "matryoshka" not in override:
        found.append(
            warn(
                name,
                "no Matryoshka override: requests with `dimensions` are answered 400 (0.5.5 and later)",
                "add --json-model-override-args '{\"is_matryoshka\": true}'",
            )
        )
    model = _catalog_model(launch)
    if model and model.shape.max_positions > model.card_context and "--context-length" not in launch.options:
        found.append(
            warn(
                name,
                f"no --context-length: the engine takes {model.shape.max_positions}, the model card says "
                f"{model.card_context}",
                f"add --context-length {model.card_context}",
            )
        )
    return found


def _combinations(launch: Launch, name: str) -> list[Check]:
    """Rows of the planner's table. One that depends on the release is left open where the release is unknown."""
    model = _catalog_model(launch)
    shape = launch.shape or (model.shape if model else CATALOG["4b"].shape)
    combination = Combination(
        version=launch.version or "0.0.0",
        flavour="cpu" if launch.value("--device") == "cpu" else "cuda",
        capability=None,
        settings=_settings(launch),
        options=launch.options,
        model_path=launch.model,
        shape=shape,
    )
    found = []
    open_rows: list[KnownBad] = []
    for row in KNOWN_BAD:
        if launch.version is None and (row.fixed or row.first != "0.0.0"):
            if row.when(combination):
                open_rows.append(row)
        elif row.applies(combination):
            found.append(known_bad(row, name, launch.version))
    if open_rows:
        codes = ", ".join(sorted({row.code for row in open_rows}))
        found.append(unknown(name, f"its SGLang release is not known; some releases are bad in this way: {codes}"))
    return found


def known_bad(row: KnownBad, name: str, version: str | None) -> Check:
    """A row of the planner's table as a check, with its link."""
    says = f"{f'sglang {version}: ' if version else ''}{row.why}{f' ({row.link})' if row.link else ''}"
    return fail(name, says, row.instead) if row.verdict == "refuse" else warn(name, says, row.instead)


def _settings(launch: Launch) -> dict[str, Any]:
    """The options in the planner's words, as far as its table asks."""
    dtype = launch.value("--dtype")
    workers = launch.value("--tokenizer-worker-num") or ""
    return {
        "dtype": "float16" if dtype in ("half", "float16") else "float32" if dtype == "float" else dtype,
        "tokenizer_workers": int(workers) if workers.isdigit() else None,
        "attention_backend": launch.value("--attention-backend"),
        "kv_cache_dtype": launch.value("--kv-cache-dtype") or "auto",
        "kv_pool": "none" if "--prefill-only-disable-kv-cache" in launch.options else None,
        "quantization": launch.value("--quantization"),
        "radix_cache": "--disable-radix-cache" not in launch.options,
    }


def _exposure(launch: Launch, name: str) -> list[Check]:
    found = []
    if launch.value("--host") in EVERYWHERE and "--host" in launch.options:
        says = "it listens for other machines, and its admin routes (weight update, flush) ask for no key"
        if "--admin-api-key" not in launch.options and "--config" not in launch.options:
            found.append(warn(name, says, "--host 127.0.0.1, and qwen3emb gateway in front"))
    shown = [flag for flag in SECRETS if flag in launch.options]
    if shown:
        says = f"{' and '.join(shown)} in the command line: every user of the machine can read it"
        found.append(warn(name, says, "keys belong in a file: qwen3emb gateway --api-keys FILE"))
    if "--trust-remote-code" in launch.options:
        says = "--trust-remote-code runs Python that the checkpoint brings along; Qwen3-Embedding needs none"
        found.append(warn(name, says, "leave it out"))
    return found


def _catalog_model(launch: Launch) -> CatalogModel | None:
    """The official model that the path names, by its size."""
    name = launch.model.lower()
    for model in CATALOG.values():
        if model.hub_id.split("/")[1].lower() in name:
            return model
    return None
