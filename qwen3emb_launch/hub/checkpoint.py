"""A checkpoint folder, read and judged without loading a weight: shape, weights, tokenizer, pooling."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3emb_launch.catalog import ModelShape, shape_from_config
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.hub.listing import no_weights

_LONGEST_HEADER = 100_000_000  # the format's own limit
_MEND = "copy it again from where it is whole, or: qwen3emb models verify MODEL --repair"
_PLAIN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. `eos_token_id` is the token its tokenizer appends, None when it appends none."""

    shape: ModelShape
    weight_bytes: int
    eos_token_id: int | None
    warnings: tuple[str, ...]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check that everything serving needs is there and whole.

    Raises InvalidInputError naming the file: `not_a_model`, `not_qwen3`, `bad_config`, `missing_shard`,
    `damaged_shard`, `pickle_only`, `no_weights`, `missing_tokenizer`, `damaged_file`.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InvalidInputError(
            "not_a_model", f"{folder} has no config.json", "give the folder that the safetensors are in"
        )
    shape = shape_from_config(_json(config_file))
    weight_bytes = sum(_weight_file(path) for path in _weight_files(folder))
    eos, tokenizer_warnings = _tokenizer(folder)
    return Checkpoint(shape, weight_bytes, eos, (*tokenizer_warnings, *_pooling_warnings(folder)))


def appended_token(post_processor: Any) -> int | None:
    """The id of the special token that a tokenizer's post-processor puts behind a single text, or None.

    Understands tokenizers' TemplateProcessing, Bert- and RobertaProcessing, and Sequences of them.
    """
    if not isinstance(post_processor, Mapping):
        return None
    kind = post_processor.get("type")
    if kind == "Sequence":
        found = [appended_token(p) for p in post_processor.get("processors") or []]
        return next((token for token in reversed(found) if token is not None), None)
    if kind in ("BertProcessing", "RobertaProcessing"):
        return int(post_processor["sep"][1])
    if kind != "TemplateProcessing" or not post_processor.get("single"):
        return None
    special = post_processor["single"][-1].get("SpecialToken")
    if special is None:
        return None
    return int(post_processor["special_tokens"][special["id"]]["ids"][-1])


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InvalidInputError("damaged_file", f"{index} names {name!r}, which is no file beside it", _MEND)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise InvalidInputError(
                "missing_shard",
                f"{folder} lacks {', '.join(missing) or 'any shard'}, named by {index.name}",
                "copy it there, or download the model again: qwen3emb download",
                details={"missing": missing},
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    raise no_weights(str(folder), sorted(p.name for p in folder.iterdir()))


def _weight_file(path: Path) -> int:
    """The file's size in bytes, once its header agrees with it."""
    size = path.stat().st_size
    said: int | None
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= min(size, _LONGEST_HEADER) else {}
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        said = 8 + length + max(ends)
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        said = None
    if said != size:
        expected = "its header cannot be read" if said is None else f"its header describes {said} bytes"
        raise InvalidInputError(
            "damaged_shard", f"{path} holds {size} bytes, but {expected}", "copy or download that file again"
        )
    return size


def _tokenizer(folder: Path) -> tuple[int | None, tuple[str, ...]]:
    fast = folder / "tokenizer.json"
    if fast.is_file():
        try:
            eos = appended_token(_post_processor(fast))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InvalidInputError(
                "damaged_file", f"{fast}: its post_processor cannot be understood ({error!r})", _MEND
            ) from error
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        eos = None
    else:
        raise InvalidInputError(
            "missing_tokenizer", f"{folder} has no tokenizer.json", "copy the tokenizer files of the model there too"
        )
    if eos is None:
        return None, (
            "the tokenizer appends no end token: the last word's state would be pooled, not <|endoftext|>'s; "
            "take tokenizer.json from the official checkpoint",
        )
    return eos, ()


def _post_processor(path: Path) -> Any:
    """The `post_processor` of a tokenizer.json, without parsing its 11 MB of vocabulary where that can be avoided.

    The value stands before the vocabulary; a token of that name would be followed by a number, never by an object.
    """
    text = path.read_text(encoding="utf-8")
    key = re.search(r'"post_processor"\s*:\s*', text)
    if key and text.rstrip().endswith("}"):  # a file cut short is for the parser to refuse
        value, _ = json.JSONDecoder().raw_decode(text, key.end())
        if value is None or isinstance(value, dict):
            return value
    return _json(path).get("post_processor")


def _pooling_warnings(folder: Path) -> tuple[str, ...]:
    """The engine pools the last token and normalises, whatever these files say: tell where they say otherwise."""
    found = []
    pooling = folder / "1_Pooling" / "config.json"
    asked = _json(pooling) if pooling.is_file() else None
    if asked is not None and not (asked.get("pooling_mode_lasttoken") or asked.get("pooling_mode") == "lasttoken"):
        found.append(f"{pooling.relative_to(folder)} asks for another pooling than the last token's, which is served")
    modules = folder / "modules.json"
    if modules.is_file():
        kinds = [str(m.get("type", "")).rsplit(".", 1)[-1] for m in _list(modules)]
        extra = [kind for kind in kinds if kind not in _PLAIN_MODULES]
        if extra:
            found.append(f"modules.json adds {', '.join(extra)}, which the engine does not apply")
    return tuple(found)


def _json(path: Path) -> dict[str, Any]:
    value = _parse(path)
    if not isinstance(value, dict):
        raise InvalidInputError("damaged_file", f"{path} is not a JSON object", "copy or download that file again")
    return value


def _list(path: Path) -> list[dict[str, Any]]:
    value = _parse(path)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InvalidInputError(
            "damaged_file", f"{path} is not readable JSON ({error})", "copy or download that file again"
        ) from error
