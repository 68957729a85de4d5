"""Products of few rows inside whole-pass graphs by our own kernel: bfloat16 weights, Hopper.

A single query's pass is bound by reading the weights, and torch's products read them at 2 to 3.3 of the 4.8 TB/s that
an H200 has. `few_rows_kernels` is written for that. It acts in graphs of few tokens alone: their rows are known when
the kernels are compiled, before the first text comes, and they are replayed one after the other, which the kernel's
scratch memory wants. Passes without a graph have torch's products.

When the model is loaded, its first layer's four products are computed for each of those graphs, and by torch in
float32. One that differs by more than the rounding of bfloat16 leaves all of them to torch. With
QWEN3EMB_PLUGIN_FEW_ROWS_AHEAD=16 each product has the L2 cache read the first 16 MB of the next one's weight, while
norms and attention run.

Off unless QWEN3EMB_PLUGIN_FEW_ROWS=1: no GPU has run it yet (docs/benchmarks/notes.md).
"""

from __future__ import annotations

import logging
import os
from itertools import pairwise
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.layer import _no_gpu_or_version
from qwen3emb_engine_plugin.prefill_graph import RUNNER
from qwen3emb_engine_plugin.switches import misfit

logger = logging.getLogger("qwen3emb_engine_plugin")

LINEAR = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod"
AHEAD = "QWEN3EMB_PLUGIN_FEW_ROWS_AHEAD"  # MB
# Ours rounds to bfloat16 (cut off, that is one step), from its own order of float32 sums: of sums that cancel a part of
# what the row's others come to. A block of 64 products left out is some hundred times as much.
STEP, OF_OTHERS = 2**-7, 2**-10
WIDENED = 4096  # of a weight's rows at once: 200 MB of float32 for the widest


class FewRows:
    """A model's products, of which the hooks ask whether they are ours; none is before `prove`."""

    def __init__(self, ahead: int = 0) -> None:
        """`ahead` is how many bytes of the next weight a product asks for."""
        self._ahead = ahead
        self.sizes: frozenset[int] = frozenset()  # graphs in which some are
        self._rows = 0  # of the graph that is being captured, 0 outside

    def apply(self, original: Any, method: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        """In place of `UnquantizedLinearMethod.apply`."""
        if not self._rows or bias is not None or not getattr(layer, "_qwen3emb_few_rows", False):
            return original(method, layer, x, bias)
        if x.dim() != 2 or x.shape[0] != self._rows or not x.is_contiguous():
            return original(method, layer, x, bias)
        from qwen3emb_engine_plugin.few_rows_kernels import choice, product

        config = choice(*layer.weight.shape, self._rows)
        if config is None:
            return original(method, layer, x, bias)
        return product(x, layer.weight, config, *layer._qwen3emb_ahead)

    def capture(self, original: Any, runner: Any, size: int) -> Any:
        """In place of `PrefillCudaGraphRunner.capture_one_shape`: two passes that compile, then the one it keeps."""
        if size not in self.sizes or not runner._is_full_backend:
            return original(runner, size)
        self._rows = size
        try:
            return original(runner, size)
        finally:
            self._rows = 0

    def prove(self, model: Any, sizes: list[int]) -> str | None:
        """Compare on the first layer's products and mark all layers' ones; why torch's stay, or None."""
        from qwen3emb_engine_plugin.few_rows_kernels import choice

        try:
            layers = [_linears(layer) for layer in model.model.layers]
            if not all(_plain(linear) for linears in layers for linear in linears):
                return "not the official models' products in bfloat16"
            ours = set()
            for linear in layers[0]:
                shape = linear.weight.shape
                for rows in sorted((one for one in sizes if choice(*shape, one)), reverse=True):
                    problem = _differs(linear, rows)
                    if problem:
                        return f"{rows} rows of {shape[1]}, weight of {shape[0]}: {problem}"
                    ours.add(rows)
        except Exception as error:  # a kernel that does not compile here is no reason not to serve
            return f"{type(error).__name__}: {error}"
        if not ours:
            return "no product of the table is in a graph here"
        flat = [linear for linears in layers for linear in linears]
        for linear, following in pairwise([*flat, None]):
            linear._qwen3emb_few_rows = True
            # In a tuple: a module would take another's weight for a parameter of its own.
            linear._qwen3emb_ahead = (following.weight, self._ahead) if following is not None and self._ahead else ()
        self.sizes = frozenset(ours)
        return None


def few_rows() -> str | None:
    """Hook the product, the capture of a graph, and the moment at which the weights are there."""
    problem = _no_gpu_or_version()
    if problem:
        return problem
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner
    from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend

    from qwen3emb_engine_plugin.few_rows_kernels import table

    problem = (
        misfit(UnquantizedLinearMethod.apply, "self layer x bias", "return F.linear(x, layer.weight, bias)")
        or misfit(PrefillCudaGraphRunner.capture_one_shape, "self size", "num_tokens = size", "backend.capture_one(")
        or misfit(FullCudaGraphBackend.capture_one, None, "for _ in range(2):", "forward_fn()")
        or misfit(ModelRunner.load_model, "self")
    )
    if problem:
        return problem
    table()  # one that cannot be read is told now
    products = FewRows(int(float(os.environ.get(AHEAD) or 0) * 1e6))

    def loaded(result: Any, runner: Any, *_: Any, **__: Any) -> Any:
        sizes = graph_sizes(runner.server_args)
        if not sizes:
            logger.info("qwen3emb plugin: few_rows has nothing to do: no embedding server's graphs of few tokens")
        elif problem := products.prove(runner.model, sizes):
            logger.warning("qwen3emb plugin: few_rows stands aside: %s", problem)
        else:
            logger.info("qwen3emb plugin: few_rows has products of the graphs of %s tokens", sorted(products.sizes))
        return result

    HookRegistry.register(f"{LINEAR}.apply", products.apply, HookType.AROUND)
    HookRegistry.register(f"{RUNNER}.capture_one_shape", products.capture, HookType.AROUND)
    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.load_model", loaded, HookType.AFTER)
    return None


def graph_sizes(arguments: Any) -> list[int]:
    """Tokens of the whole-pass graphs of an embedding server in bfloat16 that our kernel could be for."""
    from qwen3emb_engine_plugin.few_rows_kernels import MOST_ROWS

    prefill = getattr(getattr(arguments, "cuda_graph_config", None), "prefill", None)
    if not arguments.is_embedding or arguments.quantization or str(getattr(prefill, "backend", "")) != "full":
        return []
    if getattr(arguments, "torchao_config", None):  # other weights, put there after the model is loaded
        return []
    return [size for size in getattr(prefill, "bs", None) or () if size <= MOST_ROWS]


def _linears(layer: Any) -> tuple[Any, ...]:
    return layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj


def _plain(linear: Any) -> bool:
    """Whether it is an unquantised bfloat16 weight without bias, whole on this GPU, under no adapter."""
    import torch

    return (
        type(linear).__name__ in ("QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear")
        and type(linear.quant_method).__name__ == "UnquantizedLinearMethod"
        and linear.weight.dtype == torch.bfloat16
        and linear.weight.is_contiguous()
        and linear.weight.data_ptr() % 16 == 0  # or what is asked for ahead ends the process
        and getattr(linear, "bias", None) is None
        and linear.tp_size == 1
    )


def _differs(linear: Any, rows: int) -> str | None:
    """What is wrong with our product of so many random rows, or None. It compiles the kernel, too."""
    import torch

    from qwen3emb_engine_plugin.few_rows_kernels import product

    weight = linear.weight
    random = torch.Generator(device=weight.device).manual_seed(1)
    with torch.no_grad():
        x = torch.randn((rows, weight.shape[1]), generator=random, device=weight.device).to(weight.dtype)
        exact, found, again = _exact(x, weight), product(x, weight), product(x, weight)
        others = exact.pow(2).mean(dim=-1, keepdim=True).sqrt()
        # Of the larger one: a number and its neighbour across a power of two are a step of that apart.
        allowed = STEP * torch.maximum(exact.abs(), found.float().abs()) + OF_OTHERS * others
        wrong = ~((found.float() - exact).abs() <= allowed)  # NaN is not less than anything
        if wrong.any().item():
            return f"{int(wrong.sum())} numbers are not the product's"
        return None if torch.equal(found, again) else "the same product twice gives two results"


def _exact(x: Any, weight: Any) -> Any:
    """The product in float32, which nothing rounds: TensorFloat32 has all digits of bfloat16.

    Not torch's bfloat16 product: that may add up the parts of a long weight in bfloat16, and then some hundredths of
    its numbers are further from the sums than a right kernel's are.
    """
    import torch

    parts = [torch.nn.functional.linear(x.float(), part.float()) for part in weight.split(WIDENED)]
    return torch.cat(parts, dim=-1)
