"""Gate and up projection in one product that gates as it writes: bfloat16 weights, Hopper.

The stock layer writes both halves, 2 x 9,728 numbers a token in the 4B, reads them back and writes their gated half:
5% of a long batch, beside what the product itself waits for memory. QuACK, which SGLang 0.5.16 and later bring along,
has a product that keeps them in registers and reads the weights as they lie. Gating is computed in float32 there,
before rounding.

When the model is loaded, its first layer's MLP is computed both ways: that compiles the kernel (QuACK keeps it) and
shows that it is right here; otherwise the stock layer stays. Long passes only, which run without a CUDA graph: 3.8%
less on an H200, where `verify --level full` passed with it (docs/benchmarks).
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.bytecode import cache_folder
from qwen3emb_engine_plugin.layer import _no_gpu_or_version
from qwen3emb_engine_plugin.prefill_graph import compiled
from qwen3emb_engine_plugin.switches import misfit, switched_on

logger = logging.getLogger("qwen3emb_engine_plugin")

FROM = 4225  # tokens: one more than the largest graph that the launcher asks for
# The same where it may run in graphs too, which it does not unless QWEN3EMB_PLUGIN_GRAPH_GATED=1: no GPU has timed it
# there yet. By `products.py` it is 3% faster than the stock way at 2,112 tokens, 10% at 8,192.
FROM_WITH_GRAPHS = 2112
PROBE_ROWS = 256
ALIKE = 0.9999  # cosine of the two ways' outputs, row by row; bfloat16 products of other order give 0.99999


def gated() -> str | None:
    """Hook the MLP, and the moment at which its weights are there."""
    problem = _no_gpu_or_version()
    if problem:
        return problem
    keep_what_is_compiled(os.environ)
    import torch
    from quack.gemm_interface import gemm_gated
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.models.qwen2 import Qwen2MLP

    problem = (
        misfit(
            Qwen2MLP.forward, "self x forward_batch", "gate_up, _ = self.gate_up_proj(x)", "x = self.act_fn(gate_up)"
        )
        or misfit(gemm_gated, None, "store_preact", "concat_layout", "tuned")
        or misfit(ModelRunner.load_model, "self")
    )
    if problem:
        return problem
    product = Product(gemm_gated)
    in_graphs = switched_on("graph_gated", default=False)
    least = FROM_WITH_GRAPHS if in_graphs else FROM

    def forward(original: Any, self: Any, x: Any, forward_batch: Any = None) -> Any:
        if not product.proved or x.shape[0] < least or not _plain(self):
            return original(self, x, forward_batch)
        # Other settings have graphs of more tokens than the launcher's.
        if not in_graphs and torch.cuda.is_current_stream_capturing():
            return original(self, x, forward_batch)
        return self.down_proj(product(self.gate_up_proj.weight, x), forward_batch=forward_batch)[0]

    def loaded(result: Any, runner: Any, *_: Any, **__: Any) -> Any:
        if other := _other_server(runner):
            logger.info("qwen3emb plugin: gated has nothing to do: %s", other)
        elif problem := product.prove(runner.model):
            logger.warning("qwen3emb plugin: gated stands aside: %s", problem)
        return result

    HookRegistry.register("sglang.srt.models.qwen2.Qwen2MLP.forward", forward, HookType.AROUND)
    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.load_model", loaded, HookType.AFTER)
    return None


def _other_server(runner: Any) -> str | None:
    """What is served here that this product is not for, or None."""
    arguments = runner.server_args
    if not arguments.is_embedding:
        return "no server of embeddings"
    if arguments.quantization:
        return f"{arguments.quantization} weights"
    return "compiled graphs" if compiled(arguments) else None


def keep_what_is_compiled(environ: MutableMapping[str, str]) -> None:
    """Have QuACK keep its kernels in this user's cache: unasked it takes /tmp, where others may write first."""
    folder = cache_folder(environ) / "quack"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    environ.setdefault("QUACK_CACHE_DIR", str(folder))


class Product:
    """QuACK's gated product for weights that lie as [gate; up], once it has been compared with the stock way."""

    def __init__(self, gemm_gated: Any) -> None:
        self._gemm_gated = gemm_gated
        self.proved = False

    def __call__(self, weight: Any, x: Any) -> Any:
        """silu(gate) * up of `x` [tokens, width] times `weight` [2 * inner, width]: [tokens, inner]."""
        _, out = self._gemm_gated(
            x, weight.t(), activation="swiglu", store_preact=False, tuned=False, concat_layout=("B",)
        )
        return out

    def prove(self, model: Any) -> str | None:
        """Compare both ways on the first layer's MLP; why the stock one stays, or None."""
        import torch

        try:
            mlp = model.model.layers[0].mlp
            if not _plain(mlp):
                return "not the official models' MLP in bfloat16"
            weight = mlp.gate_up_proj.weight
            random = torch.Generator(device=weight.device).manual_seed(1)
            with torch.no_grad():
                x = torch.randn((PROBE_ROWS, weight.shape[1]), generator=random, device=weight.device).to(weight.dtype)
                stock, found = mlp.act_fn(mlp.gate_up_proj(x)[0]), self(weight, x)
                alike = torch.nn.functional.cosine_similarity(stock.float(), found.float(), dim=-1).min().item()
        except Exception as error:  # a kernel that does not compile here is no reason not to serve
            return f"{type(error).__name__}: {error}"
        if not alike >= ALIKE:
            return f"it computes something else here: cosine {alike:.6f} to the stock layer"
        self.proved = True
        return None


def _plain(mlp: Any) -> bool:
    """Whether these are unquantised bfloat16 weights on one GPU, with SGLang's own gating; looked at once."""
    known: bool | None = getattr(mlp, "_qwen3emb_gated", None)
    if known is None:
        import torch

        linear = mlp.gate_up_proj
        known = (
            type(mlp.act_fn).__name__ == "SiluAndMul"
            and type(linear).__name__ == "MergedColumnParallelLinear"
            and type(linear.quant_method).__name__ == "UnquantizedLinearMethod"
            and linear.weight.dtype == torch.bfloat16
            and linear.weight.is_contiguous()
            and getattr(linear, "bias", None) is None
            and linear.tp_size == 1
        )
        mlp._qwen3emb_gated = known
    return known
