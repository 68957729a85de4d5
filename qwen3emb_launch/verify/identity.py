"""What an endpoint says it is: model, context length, engine, dtype. Read, never guessed; unknown stays None."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3emb_launch.addresses import is_loopback
from qwen3emb_launch.catalog import CatalogModel, find_model
from qwen3emb_launch.errors import NetworkError
from qwen3emb_launch.verify.contact import Contact, Reply
from qwen3emb_launch.verify.tolerance import ASSUMED_LAYERS, Precision, canonical_dtype


@dataclass(frozen=True)
class Identity:
    """An endpoint by its own words and, for an instance of ours, by its launch plan.

    `context_length` is the engine's number of tokens; `folder` the checkpoint where it lies on this machine.
    `gateway` says that qwen3emb's own gateway answers, which promises more than a bare engine.
    """

    model: str
    engine: str | None = None
    engine_version: str | None = None
    context_length: int | None = None
    dtype: str | None = None
    dtype_origin: str = "unknown"
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    folder: Path | None = None
    catalog: CatalogModel | None = None
    layers: int | None = None
    demo: bool = False
    gateway: bool = False
    names: frozenset[str] = frozenset()  # what answers may call the model

    def precision(self, dtype: str | None = None) -> Precision:
        """What the tolerances follow from; `dtype` is the user's word, which wins."""
        told = canonical_dtype(dtype)
        origin = "as told" if told else self.dtype_origin
        told = told or self.dtype
        layers = self.layers or (self.catalog.shape.layers if self.catalog else ASSUMED_LAYERS)
        return Precision(told or "bfloat16", origin if told else "assumed", layers, self.quantization)


def ask_identity(contact: Contact, model: str | None = None) -> Identity:
    """First contact. Raises NetworkError when nothing answers or the key is refused."""
    listed, gateway = _models(contact)
    info = _optional(contact, f"{contact.root}/server_info") or _optional(contact, f"{contact.root}/get_server_info")
    chosen = model or next((str(m.get("id")) for m in listed if m.get("id")), "") or str(info.get("model_path", ""))
    entry: dict[str, Any] = next((m for m in listed if m.get("id") == chosen), listed[0] if listed else {})
    contact.model = chosen
    path = str(info.get("model_path") or entry.get("root") or chosen)
    folder = _folder(path) if is_loopback(contact.base_url) else None
    config = _read_json(folder / "config.json") if folder else {}
    dtype = canonical_dtype(info.get("dtype"))
    origin = "the server says"
    own = entry if gateway else {}  # of others' lists nobody knows what such words mean
    if dtype is None and own:
        dtype, origin = canonical_dtype(_text(own.get("dtype"))), "the gateway says"
    if dtype is None and config:
        dtype, origin = canonical_dtype(config.get("dtype") or config.get("torch_dtype")), "the checkpoint's"
    owner = str(entry.get("owned_by") or "")
    engine = "sglang" if "is_embedding" in info or owner == "sglang" else (owner or None)
    if gateway:
        engine = None  # whatever it stands before; an instance's plan knows
    named = (chosen, path, info.get("served_model_name"), info.get("tokenizer_path"))
    longest = _positive(entry.get("max_input_tokens"))
    return Identity(
        model=chosen,
        engine=engine,
        engine_version=_text(info.get("version")),
        context_length=_positive(info.get("context_length"))
        or _positive(entry.get("max_model_len"))
        or (longest + 1 if longest else None),
        dtype=dtype,
        dtype_origin=origin if dtype else "unknown",
        quantization=_text(info.get("quantization")) or _text(own.get("quantization")),
        kv_cache_dtype=_text(info.get("kv_cache_dtype")),
        device=_text(info.get("device")),
        revision=_text(info.get("revision")),
        folder=folder,
        catalog=catalog_of(chosen) or catalog_of(path),
        layers=_positive(config.get("num_hidden_layers")),
        demo="qwen3emb_demo" in config,
        gateway=gateway,
        names=frozenset(
            n for n in (*named, *(m.get(k) for m in listed for k in ("id", "root"))) if n and isinstance(n, str)
        ),
    )


def from_checkpoint(folder: Path, identity: Identity) -> dict[str, Any]:
    """What the folder named by the user tells of an endpoint that says little of itself, as changes to `identity`."""
    config = _read_json(folder / "config.json")
    told: dict[str, Any] = {"folder": folder, "demo": "qwen3emb_demo" in config}
    told["layers"] = identity.layers or _positive(config.get("num_hidden_layers"))
    told["catalog"] = identity.catalog or catalog_of(str(folder))
    dtype = canonical_dtype(config.get("dtype") or config.get("torch_dtype"))
    if identity.dtype is None and dtype:
        told |= {"dtype": dtype, "dtype_origin": "the checkpoint's"}
    return told


def from_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What an instance's plan.json says beyond the server's own words: fields of Identity, known ones only."""
    model, engine = _part(plan, "model"), _part(plan, "engine")
    shape = _part(model, "shape")
    folder = Path(str(model["path"])) if model.get("path") else None
    settings = {s.get("key"): s.get("value") for s in plan.get("settings", []) if isinstance(s, dict)}
    dtype = canonical_dtype(_text(settings.get("dtype"))) or canonical_dtype(_text(shape.get("dtype")))
    flavour = engine.get("flavour")
    told = {
        "engine": "sglang",
        "engine_version": _text(engine.get("version")),
        "context_length": _positive(plan.get("context_length")),
        "dtype": dtype,
        "dtype_origin": "the plan's" if dtype else None,
        "quantization": _text(settings.get("quantization")),
        "kv_cache_dtype": _text(settings.get("kv_cache_dtype")),
        "device": {"cpu": "cpu", "cuda": "cuda"}.get(str(flavour)),
        "revision": _text(model.get("revision")),
        "folder": folder,
        "catalog": catalog_of(str(model.get("catalog_key") or model.get("name") or "")),
        "layers": _positive(shape.get("layers")),
        "demo": "qwen3emb_demo" in _read_json(folder / "config.json") if folder else None,
    }
    return {key: value for key, value in told.items() if value is not None}


def catalog_of(name: str) -> CatalogModel | None:
    """The official model of an id, or of a snapshot's folder in Hugging Face's cache."""
    cached = re.search(r"/models--([^/]+?)--([^/]+)/", name)
    return find_model("/".join(cached.groups()) if cached else name)


def _part(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _models(contact: Contact) -> tuple[list[dict[str, Any]], bool]:
    reply = contact.get(f"{contact.base_url}/models")
    if reply.status in (401, 403):
        raise NetworkError(
            "unauthorised",
            f"{contact.base_url} refuses the API key ({reply.status}: {reply.message})",
            "--api-key-file FILE, or the key in OPENAI_API_KEY",
        )
    if reply.status == 404 and not contact.base_url.endswith("/v1"):
        below = contact.get(f"{contact.base_url}/v1/models")
        if below.status == 200:
            contact.base_url += "/v1"
            return _models(contact)
    data = reply.data.get("data") if isinstance(reply.data, dict) else None
    listed = [m for m in data if isinstance(m, dict)] if isinstance(data, list) else []
    return listed, _is_gateway(reply, listed)


def _is_gateway(reply: Reply, listed: list[dict[str, Any]]) -> bool:
    served = reply.headers.get("server", "")
    return served.startswith("qwen3emb") or any(m.get("owned_by") == "qwen3emb" for m in listed)


def _optional(contact: Contact, url: str) -> dict[str, Any]:
    """An information route that only some servers have."""
    try:
        reply = contact.get(url)
    except NetworkError:
        return {}
    return reply.data if reply.status == 200 and isinstance(reply.data, dict) else {}


def _folder(path: str) -> Path | None:
    """The checkpoint's folder when it lies on this machine."""
    folder = Path(path)
    return folder if folder.is_absolute() and (folder / "config.json").is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _text(value: Any) -> str | None:
    return str(value) if value not in (None, "", "auto", "none") else None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
