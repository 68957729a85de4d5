"""What a launch takes in GPU (or host) memory, by arithmetic that can be shown. Bytes; GB in messages is 1e9 of them.

The estimate is the worst case the engine can be brought to: the longest input, or the fullest prefill batch. Measured
for comparison: the 4B on an H100 without a KV pool took 9.26 GB under short texts (estimate without activations and
graphs: 8.7 GB).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qwen3emb_launch.catalog import ModelShape
from qwen3emb_launch.facts import MemoryEstimate, ModelFacts

WIDTHS: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "auto": 2}
KV_WIDTHS: Mapping[str, int] = {"bfloat16": 2, "auto": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8": 1}
CUDA_CONTEXT = 600_000_000  # context, cuBLAS workspaces and loaded kernels of one process
GRAPH = 8 * 2**20  # what SGLang itself reserves for one captured prefill size
LOADER = 300_000_000  # what loading leaves cached; it counts against mem_fraction_static
SLACK = 1.25  # allocator fragmentation over the tensors that live at once
HOST_PROCESSES = 3_000_000_000  # three python processes with torch, on a host without a GPU


def gigabytes(count: float) -> str:
    """For messages: `8.04 GB`."""
    return f"{count / 1e9:.2f} GB"


def weight_bytes(model: ModelFacts, dtype: str, quantization: str, tp: int = 1) -> int:
    """The body's weights on one GPU. fp8 halves the layers' matrices only: embeddings and norms stay 16 bits wide."""
    shape = model.shape
    if quantization == "none":
        return shape.parameters * WIDTHS[dtype] // tp
    if quantization == "fp8":
        return (shape.linear_parameters + (shape.parameters - shape.linear_parameters) * WIDTHS[dtype]) // tp
    return model.weight_bytes // tp  # a checkpoint that was quantised before: its own size


def head_bytes(shape: ModelShape, dtype: str, tp: int = 1) -> int:
    """SGLang allocates an lm_head for models with untied embeddings, though an embedding server never uses it."""
    return 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size * WIDTHS[dtype] // tp


def kv_bytes_per_token(shape: ModelShape, kv_dtype: str, dtype: str, tp: int = 1) -> int:
    """One token's keys and values on one GPU."""
    width = WIDTHS[dtype] if kv_dtype == "auto" else KV_WIDTHS[kv_dtype]
    return shape.kv_bytes_per_token(width) // tp


def activation_bytes(shape: ModelShape, tokens: int, dtype: str, tp: int = 1) -> int:
    """Tensors alive at once in the widest stage of a layer, for a forward pass of `tokens` tokens.

    Attention holds q, k, v and its output; the MLP gate, up and their product; both the residual and the normed input.
    """
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim // tp
    mlp = 3 * shape.mlp_size // tp
    return int(tokens * (max(attention, mlp) + 2 * shape.hidden_size) * WIDTHS[dtype] * SLACK)


def graph_bytes(shape: ModelShape, sizes: Sequence[int], dtype: str, tp: int = 1) -> int:
    """All captured sizes, and the pool of tensors that they share: as much as the largest needs, and never lent to
    passes without a graph. Eleven sizes to 2,048 tokens of the 4B took 0.32 GB on an H100; by this 0.27."""
    return GRAPH * len(sizes) + activation_bytes(shape, max(sizes, default=0), dtype, tp)


def request_table_bytes(requests: int, context_length: int) -> int:
    """Where each running request's tokens lie: an int32 for every position a request may have."""
    return (requests + 1) * (context_length + 4) * 4


def needed_tokens(context_length: int, page_size: int) -> int:
    """The smallest pool that cannot hang: an input longer than the pool waits for ever and everything behind it
    (sgl-project/sglang#40459)."""
    return context_length + page_size + 8


def round_up(value: float, step: int) -> int:
    """The next multiple of `step`."""
    return math.ceil(value / step) * step


def pool_tokens(budget: int, weights: int, bytes_per_token: int) -> int:
    """Tokens that the engine fits into `budget` bytes (mem_fraction_static of the free memory) beside the weights."""
    return max(0, (budget - weights - LOADER) // max(1, bytes_per_token))


def fraction_for(weights: int, tokens: int, bytes_per_token: int, free: int) -> float:
    """The mem_fraction_static that holds weights and `tokens` tokens, in hundredths, rounded up. May pass 1."""
    return math.ceil(100 * (weights + LOADER + tokens * bytes_per_token) / max(1, free)) / 100


def estimate(terms: Mapping[str, int], total: int, available: int | None) -> MemoryEstimate:
    """The addends that are not zero, beside what there is."""
    return MemoryEstimate({name: size for name, size in terms.items() if size}, total, available)


def arithmetic(memory: MemoryEstimate) -> str:
    """`weights 8.04 GB + KV pool 4.83 GB + … = 13.90 GB`."""
    parts = " + ".join(f"{name} {gigabytes(size)}" for name, size in memory.terms.items())
    return f"{parts} = {gigabytes(memory.needed_bytes)}"
