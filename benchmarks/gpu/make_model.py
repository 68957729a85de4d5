"""A checkpoint of an official Qwen3-Embedding shape with random weights, for hosts where the real ones cannot be had.

    python benchmarks/gpu/make_model.py 4b OUT_DIR [--no-weights]

The work a token costs is the same as with the real weights. The tokenizer is byte-level BPE trained here on the source
text of Python's standard library, so that tokenising costs what it costs; ids lie inside the official vocabulary, and
<|endoftext|> is appended as the official tokenizer does. `--no-weights` writes config and tokenizer only, for
`--load-format dummy`. Runs on any machine with `tokenizers`; with weights it needs torch, and a GPU to be quick.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qwen3emb_launch.catalog import CATALOG, ModelShape

EOS = 151643
# How Qwen's tokenizer cuts a text before its merges: the published tokenizer.json has it, and its class insists on it.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAINED = 24_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(CATALOG))
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-weights", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.out, CATALOG[args.model].shape, weights=not args.no_weights, seed=args.seed)


def make(out: Path, shape: ModelShape, *, weights: bool, seed: int = 0) -> Path:
    """Write the checkpoint into `out`; what is there already is kept."""
    out.mkdir(parents=True, exist_ok=True)
    config = out / "config.json"
    config.write_text(json.dumps(hf_config(shape), indent=1))
    if not (out / "tokenizer.json").exists():
        write_tokenizer(out, shape.max_positions)
    if weights and not (out / "model.safetensors").exists():
        write_weights(out / "model.safetensors", shape, seed)
    return out


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """config.json as the official checkpoints have it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.mlp_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": EOS,
        "eos_token_id": EOS + 2,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shape.layers,
    }


def write_tokenizer(out: Path, max_length: int) -> None:
    """Train byte-level BPE on the standard library's sources and give <|endoftext|> its official id."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(str(p) for p in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(sources, trainers.BpeTrainer(vocab_size=TRAINED, initial_alphabet=alphabet, show_progress=False))
    data = json.loads(tokenizer.to_str())
    # Entries that no merge leads to, up to the special tokens: without them those are given the next free ids instead.
    vocabulary: dict[str, int] = data["model"]["vocab"]
    vocabulary |= {f"unused {i}": i for i in range(len(vocabulary), EOS)}
    end = "<|endoftext|>"
    special = [(EOS, end), (EOS + 1, "<|im_start|>"), (EOS + 2, "<|im_end|>")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [{"id": i, "content": token, **flags} for i, token in special]
    stop = {"SpecialToken": {"id": end, "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, stop],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, stop, {"Sequence": {"id": "B", "type_id": 1}}, stop],
        "special_tokens": {end: {"id": end, "ids": [EOS], "tokens": [end]}},
    }
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|im_end|>",
                "pad_token": end,
                "model_max_length": max_length,
                "clean_up_tokenization_spaces": False,
            }
        )
    )


def write_weights(path: Path, shape: ModelShape, seed: int) -> None:
    """Random normal weights (0.02, as the architecture initialises them), norms one, one safetensors file."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*size: int) -> Any:
        values = torch.empty(size, dtype=torch.bfloat16, device=device)
        return values.normal_(0.0, 0.02, generator=generator).cpu()

    def ones(size: int) -> Any:
        return torch.ones(size, dtype=torch.bfloat16)

    hidden, wide, narrow = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": draw(shape.vocab_size, hidden), "model.norm.weight": ones(hidden)}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": ones(hidden),
            at + "post_attention_layernorm.weight": ones(hidden),
            at + "self_attn.q_proj.weight": draw(wide, hidden),
            at + "self_attn.k_proj.weight": draw(narrow, hidden),
            at + "self_attn.v_proj.weight": draw(narrow, hidden),
            at + "self_attn.o_proj.weight": draw(hidden, wide),
            at + "self_attn.q_norm.weight": ones(shape.head_dim),
            at + "self_attn.k_norm.weight": ones(shape.head_dim),
            at + "mlp.gate_proj.weight": draw(shape.mlp_size, hidden),
            at + "mlp.up_proj.weight": draw(shape.mlp_size, hidden),
            at + "mlp.down_proj.weight": draw(hidden, shape.mlp_size),
        }
    save_file(tensors, str(path), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
