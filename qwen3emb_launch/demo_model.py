"""Checkpoints with the Qwen3-Embedding architecture and random weights, made locally with the standard library.

They answer meaningless vectors by the real code path: tests, CI and `--profile demo` serve them with the real engine.
The same seed and shape give the same bytes on every machine. The tokenizer is byte-level BPE without merges (one a
byte) and appends <|endoftext|> as the official one does.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from qwen3emb_launch.disk import disk_error

DEMO_NAME = "Qwen3-Embedding-demo"  # engines before 0.5.9 load weights only where the path says "Embedding"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_ID = 256  # <|endoftext|>, right behind the 256 byte tokens
VOCAB = 264  # 256 bytes, three special tokens, padded to a multiple of eight


@dataclass(frozen=True)
class DemoShape:
    """A small Qwen3. The default has 1.2M parameters and a vector of 256 numbers."""

    hidden_size: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp_size: int = 512
    max_positions: int = 16384
    seed: int = 1


def make_demo_model(folder: Path, shape: DemoShape | None = None) -> Path:
    """Write the checkpoint into `folder` unless it is there already; a half-written one is never left behind.

    Raises UnfitError (`disk_full`, `folder_unwritable`) when the disk refuses.
    """
    shape = shape or DemoShape()
    stamp = json.dumps(_config(shape), sort_keys=True)
    try:
        if not _is_made(folder, stamp):
            _make(folder, shape, stamp)
    except OSError as error:
        if not _is_made(folder, stamp):  # else another process was faster, and its folder is as good
            raise disk_error(error, folder) from error
    return folder


def _is_made(folder: Path, stamp: str) -> bool:
    marker = folder / "demo.json"
    return marker.is_file() and marker.read_text(encoding="utf-8") == stamp


def _make(folder: Path, shape: DemoShape, stamp: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write_json(partial / "config.json", _config(shape))
        _write_json(partial / "tokenizer.json", _tokenizer())
        _write_json(partial / "tokenizer_config.json", _tokenizer_config(shape))
        _write_safetensors(partial / "model.safetensors", shape)
        (partial / "demo.json").write_text(stamp, encoding="utf-8")
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _config(shape: DemoShape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.mlp_size,
        "vocab_size": VOCAB,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID + 2,  # as the official config: not the token that is pooled
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shape.layers,
        "qwen3emb_demo": {"seed": shape.seed, "version": 1},
    }


def _tokenizer_config(shape: DemoShape) -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
    }


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, mapped to the byte: the vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(shifted)}


def _tokenizer() -> dict[str, Any]:
    end = SPECIAL[0]
    first: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    second: dict[str, Any] = {"Sequence": {"id": "B", "type_id": 1}}
    stop: dict[str, Any] = {"SpecialToken": {"id": end, "type_id": 0}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": EOS_ID + i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, stop],
            "pair": [first, stop, second, stop],
            "special_tokens": {end: {"id": end, "ids": [EOS_ID], "tokens": [end]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": _byte_alphabet(),
            "merges": [],
        },
    }


def _bf16(value: float) -> int:
    """The 16 bits of the nearest bfloat16."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def _tensors(shape: DemoShape) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    """Name, shape and standard deviation of each tensor; None stands for ones."""
    hidden, width = shape.hidden_size, shape.head_dim
    queries, keys = shape.heads * width, shape.kv_heads * width
    inner = 1 / math.sqrt(hidden)
    yield "model.embed_tokens.weight", (VOCAB, hidden), 1.0
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,), None
        yield at + "self_attn.q_proj.weight", (queries, hidden), inner
        yield at + "self_attn.k_proj.weight", (keys, hidden), inner
        yield at + "self_attn.v_proj.weight", (keys, hidden), inner
        yield at + "self_attn.o_proj.weight", (hidden, queries), 1 / math.sqrt(queries)
        yield at + "self_attn.q_norm.weight", (width,), None
        yield at + "self_attn.k_norm.weight", (width,), None
        yield at + "post_attention_layernorm.weight", (hidden,), None
        yield at + "mlp.gate_proj.weight", (shape.mlp_size, hidden), inner
        yield at + "mlp.up_proj.weight", (shape.mlp_size, hidden), inner
        yield at + "mlp.down_proj.weight", (hidden, shape.mlp_size), 1 / math.sqrt(shape.mlp_size)
    yield "model.norm.weight", (hidden,), None


def _write_safetensors(path: Path, shape: DemoShape) -> None:
    """The file format: eight bytes of header length, a JSON header, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims, _ in _tensors(shape):
        end = offset + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = random.Random(shape.seed)  # noqa: S311 - weights, not secrets
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, dims, deviation in _tensors(shape):
            file.write(_values(source, math.prod(dims), deviation))


def _values(source: random.Random, count: int, deviation: float | None) -> bytes:
    """`count` bfloat16 values: ones, or uniform over 256 levels with the given standard deviation.

    A random byte picks its level through two translation tables, one a byte of the result: no loop over weights.
    """
    if deviation is None:
        return struct.pack("<H", _bf16(1.0)) * count
    reach = deviation * math.sqrt(3)
    levels = [_bf16((i - 127.5) / 127.5 * reach) for i in range(256)]
    low, high = bytes(v & 255 for v in levels), bytes(v >> 8 for v in levels)
    picks = source.randbytes(count)
    out = bytearray(2 * count)
    out[0::2] = picks.translate(low)
    out[1::2] = picks.translate(high)
    return bytes(out)
