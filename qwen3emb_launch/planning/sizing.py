"""The rules about memory: tokens of the KV pool, the share of the card that is asked for, and whether it all fits."""

from __future__ import annotations

import math

from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.facts import MemoryEstimate
from qwen3emb_launch.planning import memory
from qwen3emb_launch.planning.ledger import Ledger
from qwen3emb_launch.planning.rules import Surroundings

LARGEST_SHARE = 0.98  # that the engine is told, where several share a card or it only counts
MOST = 0.95  # of the free memory where a pool is allocated: the rest is for activations and the allocator
AFTER_THE_POOL = ("activations", "request table", "CUDA graphs")  # terms of the estimate that come beside it


def size(around: Surroundings, ledger: Ledger, ram_bytes: int | None) -> MemoryEstimate | None:
    """Decide `max_total_tokens` and `mem_fraction_static`, and estimate. Nothing is refused yet, see `refuse`.

    Of several engines each is planned as if it had its part of the device alone.
    None when there is nothing to compare with and nothing to size: an unknown GPU.
    """
    shape, tp = around.model.shape, int(ledger.value("tp"))
    dtype, quantization = ledger.value("dtype"), ledger.value("quantization")
    weights = memory.weight_bytes(around.model, dtype, quantization, tp)
    head = memory.head_bytes(shape, dtype, tp)
    cell = memory.kv_bytes_per_token(shape, ledger.value("kv_cache_dtype"), dtype, tp)
    context, chunk = int(ledger.value("context_length")), int(ledger.value("chunked_prefill_size"))
    prefill = int(ledger.value("max_prefill_tokens"))
    widest = chunk if chunk > 0 else max(context, prefill)
    pooled = ledger.value("kv_pool") != "none"
    smallest = memory.needed_tokens(context, around.page_size(ledger))
    count = int(ledger.value("replicas"))
    free = (around.gpu.free_bytes // count - memory.CUDA_CONTEXT) if around.cuda and around.gpu else None

    beside = {
        "activations": memory.activation_bytes(shape, widest, dtype, tp),
        "request table": memory.request_table_bytes(int(ledger.value("max_running_requests")), context),
    }
    if around.cuda:
        beside["CUDA graphs"] = memory.graph_bytes(shape, ledger.value("prefill_graph_sizes") or (), dtype, tp)
    tokens = _tokens(ledger, smallest, chunk if chunk > 0 else prefill, double=around.cuda)
    if free is not None:
        spare = sum(beside.values()) if pooled else None
        tokens = _fraction(ledger, weights + head, tokens, smallest, cell, free, spare)
    elif "mem_fraction_static" in ledger.given:  # nobody else decides it on a CPU; the engine takes it of the memory
        fraction = float(ledger.decide("mem_fraction_static", None, ""))
        if tokens is None and ram_bytes is not None:
            tokens = memory.pool_tokens(int(ram_bytes * fraction), weights + head, cell)
    terms = {
        "weights": weights,
        "unused lm_head": head,
        "KV pool": (tokens or smallest) * cell if pooled else 0,
        **beside,
    }
    if around.cuda:
        terms["CUDA context"] = memory.CUDA_CONTEXT
        total, available = (around.gpu.total_bytes, around.gpu.free_bytes) if around.gpu else (0, None)
    else:
        terms["processes"] = memory.HOST_PROCESSES
        total, available = (ram_bytes or 0), ram_bytes
    if count > 1:
        one = sum(terms.values())
        if free is not None and around.gpu:
            spare = sum(beside.values()) if pooled else None
            _share(ledger, tokens, free, (count - 1) * one, around.gpu.free_bytes - memory.CUDA_CONTEXT, spare)
        terms[f"{count - 1} more of it"] = (count - 1) * one
    return memory.estimate(terms, total, available)


def _share(ledger: Ledger, tokens: int | None, free: int, others: int, whole: int, spare: int | None) -> None:
    """Say to each of several engines on a card which share of it to take.

    An engine takes mem_fraction_static of what is free when it starts, less what was taken since. The others (`others`
    bytes in all) may have taken theirs before, after, or in between: a share that also covers theirs is enough in each
    order, and the token count keeps the engine from taking more than its own.
    """
    asked = float(ledger.value("mem_fraction_static"))
    if ledger.value("max_total_tokens") is None:
        ledger.decide("max_total_tokens", tokens, "what this engine's part of mem_fraction_static holds")
    share = math.ceil(100 * (asked * free + others) / max(1, whole)) / 100
    if "mem_fraction_static" in ledger.given:
        why = f"{asked:g} of this engine's part, and room for the others, which start at the same time"
    else:
        share, why = max(share, roomy(whole, spare)), "the others of this plan start at the same time"
    ledger.respell("mem_fraction_static", min(share, LARGEST_SHARE), why)


def _tokens(ledger: Ledger, smallest: int, batch: int, *, double: bool) -> int | None:
    """Tokens to ask for; None where a given mem_fraction_static is to be filled."""
    given = ledger.asked("max_total_tokens")
    if given is not None and given < smallest:
        raise InvalidInputError(
            "pool_too_small",
            f"max_total_tokens {given} is less than the {smallest} that the context length needs: the engine would "
            "queue the longest input for ever, and everything behind it",
            f"--set max_total_tokens={smallest}, or a smaller context_length",
        )
    if given is None and "mem_fraction_static" in ledger.given and ledger.value("kv_pool") != "none":
        ledger.decide("max_total_tokens", None, "the pool fills mem_fraction_static, which was given", origin="default")
        return None
    batches = 2 if double else 1  # the next batch is prepared while one runs
    if ledger.value("radix_cache"):
        batches *= 2
    wanted = memory.round_up(smallest + batches * batch, 1024)
    what = "pool" if ledger.value("kv_pool") != "none" else "count (nothing is allocated)"
    return int(
        ledger.decide(
            "max_total_tokens", wanted, f"the {what} holds the longest input and the batches in flight, no more"
        )
    )


def roomy(free: int, spare: int | None) -> float:
    """The mem_fraction_static that leaves neighbours room, where `max_total_tokens` bounds what is taken.

    SGLang looks at what is free before it loads and again after it: for tokens it takes what is left above the share
    that is not static. What other engines took in between is missing there, so that a share of just weights and tokens
    ends a start beside others, or leaves fewer tokens than the longest input has. `spare` is what the engine still
    needs after its pool, None where nothing is allocated for the tokens, which are then only counted.
    """
    if spare is None:
        return LARGEST_SHARE
    return min(MOST, math.floor(100 * (1 - spare / max(1, free))) / 100)


def _fraction(
    ledger: Ledger, weights: int, tokens: int | None, smallest: int, cell: int, free: int, spare: int | None
) -> int:
    """Decide mem_fraction_static; return how many tokens the engine will find room for."""
    wanted = min(round(memory.fraction_for(weights, tokens or smallest, cell, free) + 0.01, 2), MOST)
    taken = "the tokens are counted, and no memory is taken for them" if spare is None else (
        "max_total_tokens bounds the pool, and what a batch takes is left free"
    )  # fmt: skip
    why = f"{taken}; the rest of the share is room for engines that load on this GPU at the same time"
    fraction = float(ledger.decide("mem_fraction_static", max(wanted, roomy(free, spare)), why))
    room = memory.pool_tokens(int(free * fraction), weights, cell)
    if tokens is None:
        return room
    if smallest <= room < tokens and "max_total_tokens" not in ledger.given:
        return int(ledger.decide("max_total_tokens", room, "what fits beside the weights"))
    return min(room, tokens)


def shortfall(around: Surroundings, ledger: Ledger, estimate: MemoryEstimate) -> str:
    """Why the plan cannot run here, with the arithmetic; empty when it can."""
    have = estimate.available_bytes
    if have is None:
        return ""
    where = around.gpu.name if around.gpu else "this machine"
    if not estimate.fits:
        there = f"{memory.gigabytes(have)} free of {memory.gigabytes(estimate.total_bytes)}"
        return f"{memory.arithmetic(estimate)}, and {where} has {there}"
    if not around.gpu:
        return ""
    count = int(ledger.value("replicas"))
    others = estimate.needed_bytes // count * (count - 1)
    loading = _loading_bytes(around, ledger)
    if loading and loading + others > have:
        return (
            f"weights are loaded as published and quantised then: that takes {memory.gigabytes(loading)} for a while, "
            f"and {where} has {memory.gigabytes(have)} free"
        )
    fraction = float(ledger.value("mem_fraction_static"))
    shape, tp, dtype = around.model.shape, int(ledger.value("tp")), ledger.value("dtype")
    weights = estimate.terms["weights"] + estimate.terms.get("unused lm_head", 0)
    cell = memory.kv_bytes_per_token(shape, ledger.value("kv_cache_dtype"), dtype, tp)
    budget = int((have - memory.CUDA_CONTEXT) * fraction) - others
    room = memory.pool_tokens(budget, weights, cell)
    smallest = memory.needed_tokens(int(ledger.value("context_length")), around.page_size(ledger))
    if room < smallest:
        return (
            f"mem_fraction_static {fraction:g} of the {memory.gigabytes(have)} free on {where} is "
            f"{memory.gigabytes(budget)}; beside weights of {memory.gigabytes(weights)} it holds {room} tokens of "
            f"{cell} bytes, and context_length {ledger.value('context_length')} needs {smallest}"
        )
    return ""


def _loading_bytes(around: Surroundings, ledger: Ledger) -> int:
    """The peak of a start with fp8 weights; without quantisation, what stays is the peak."""
    if ledger.value("quantization") != "fp8":
        return 0
    tp, dtype = int(ledger.value("tp")), ledger.value("dtype")
    weights = memory.weight_bytes(around.model, dtype, "none", tp) + memory.head_bytes(around.model.shape, dtype, tp)
    return weights + memory.CUDA_CONTEXT


def unfit(around: Surroundings, why: str, estimate: MemoryEstimate, alternative: str | None) -> UnfitError:
    """The refusal, with what would fit instead."""
    bigger = "use a larger GPU" if around.gpu else "take a smaller model, or fewer replicas"
    return UnfitError(
        "vram" if around.gpu else "memory",
        f"{around.model.name} does not fit: {why}",
        f"this would fit: {alternative}" if alternative else f"free some memory, or {bigger}",
        {"terms": dict(estimate.terms), "needed": estimate.needed_bytes, "available": estimate.available_bytes},
    )
