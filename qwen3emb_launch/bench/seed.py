"""The published table that this project answers, measured claim by claim on the endpoint at hand.

The claims are for Qwen3-Embedding-4B on one RTX 4090. Beside each stands what was measured, and for a prefill the time
below which this GPU cannot do the arithmetic at all: its dense BF16 peak (NVIDIA's own figures, sparsity left out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwen3emb_launch.bench.modes import Campaign
from qwen3emb_launch.bench.record import Record, Run
from qwen3emb_launch.bench.spec import Phase
from qwen3emb_launch.bench.target import Ready
from qwen3emb_launch.catalog import ModelShape, find_model

# Dense BF16 with FP32 accumulation, floating-point operations a second; the longest name that occurs wins.
PEAKS: Mapping[str, float] = {
    "3090": 71e12,
    "4090": 165e12,
    "5090": 210e12,
    "L4": 121e12,
    "A10": 125e12,
    "L40S": 362e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}
DIMS = (128, 256, 512, 2560)
BURST = 3.0
BASE_LOAD = 0.4  # of the peak: three times it is more than the endpoint can do, which is what a burst is


def floor_seconds(shape: ModelShape, gpu: str, texts: int, tokens: int) -> float | None:
    """The least time for one prefill of `texts` texts of `tokens` tokens at the GPU's peak; None for an unknown GPU."""
    words = gpu.replace("-", " ").split()
    match = next((peak for name, peak in PEAKS.items() if name in words), None)
    return None if match is None else texts * tokens * shape.flops_per_token(tokens) / match


def seed_table(campaign: Campaign) -> Record:
    """Measure every row on the first target. Ctrl-C leaves the rows that are done."""
    claims: list[Mapping[str, Any]] = []
    ready = campaign.targets[0]
    shaping = campaign.shaping
    for row in (_prefill, _batch_p95, _dims, _burst):
        if campaign.interrupted:
            break
        claims += row(campaign, ready)
        campaign.shaping = shaping
    return campaign.record("seed", claims=tuple(claims))


def _one(campaign: Campaign, ready: Ready, phase: str, clients: int, **changes: Any) -> Run | None:
    """One closed-loop load of a row's own form; the row's name is its phase."""
    campaign.shaping = replace(campaign.shaping, shape="closed")
    changed = replace(ready, spec=replace(ready.spec, **changes))
    warm = Phase("warmup", campaign.shaping.warmup, clients, measured=False)
    found = campaign.measure(changed, (warm, Phase(phase, campaign.shaping.seconds, clients)), title=phase)
    return found[-1] if found else None


def _prefill(campaign: Campaign, ready: Ready) -> list[Mapping[str, Any]]:
    run = _one(campaign, ready, "32 x 2048 tokens", 1, batch=32, lengths="2048", dims=None)
    seen = run.figures.latency.p50 if run else None
    model = find_model(str(ready.target.facts.get("model") or ready.spec.model))
    shape = ready.target.shape or (model.shape if model else None)
    own = floor_seconds(shape, str(ready.target.facts.get("gpu") or ""), 32, 2048) if shape else None
    four = find_model("4b")
    claimed = floor_seconds(four.shape, "4090", 32, 2048) if four else None
    verdict = "impossible on the card it was claimed for"
    if claimed:
        verdict += f": {claimed:.1f} s at its peak"
    return [
        {
            "claim": "batch of 32 x 2048 tokens, 4B on an RTX 4090",
            "stated": "85 ms",
            "measured": _ms(seen),
            "floor": _ms(own * 1000) if own else None,
            "verdict": verdict,
        }
    ]


def _batch_p95(campaign: Campaign, ready: Ready) -> list[Mapping[str, Any]]:
    run = _one(campaign, ready, "batch 16", 4, batch=16, dims=None)
    latency = run.figures.latency if run else None
    return [
        {
            "claim": f"P95 of batches of 16 texts of {campaign.work.tokens} tokens, 4 clients",
            "stated": None,
            "measured": f"p95 {_ms(latency.p95)}, p50 {_ms(latency.p50)}" if latency else None,
            "floor": None,
            "verdict": "no stated figure at hand to compare with",
        }
    ]


def _dims(campaign: Campaign, ready: Ready) -> list[Mapping[str, Any]]:
    seen = campaign.seen.get(ready.target.name)
    width = seen.dims if seen else None
    rows: list[Mapping[str, Any]] = []
    for dims in DIMS:
        claim = f"{dims} dims: storage of a vector against 2048"
        if width is not None and dims > width:
            rows.append({"claim": claim, "measured": None, "verdict": f"the model has {width} dimensions"})
            continue
        run = None
        if not campaign.interrupted:
            run = _one(campaign, ready, f"{dims} dims", 16, batch=1, dims=dims)
        speed = f"{run.figures.texts_per_s:.0f} texts/s, p50 {_ms(run.figures.latency.p50)}" if run else None
        change = dims / 2048 - 1
        rows.append(
            {
                "claim": claim,
                "stated": "-87%" if dims == 128 else None,
                "measured": speed,
                "floor": None,
                "verdict": f"{4 * dims:,} bytes a vector, {change:+.2%}",
            }
        )
    return rows


def _burst(campaign: Campaign, ready: Ready) -> list[Mapping[str, Any]]:
    peak = _one(campaign, ready, "peak", 32, batch=1, dims=None)
    rate = peak.figures.requests_per_s * BASE_LOAD if peak else 0.0
    if rate <= 0 or campaign.interrupted:
        return []
    shaping = replace(campaign.shaping, shape="open", level=rate)
    campaign.shaping = shaping
    runs = campaign.measure(
        replace(ready, spec=replace(ready.spec, batch=1, dims=None)),
        (
            Phase("warmup", shaping.warmup, rate, measured=False),
            Phase("before burst", shaping.seconds, rate),
            Phase("3x burst", shaping.seconds, rate * BURST),
            Phase("after burst", shaping.seconds, rate),
        ),
        title="3x burst",
    )
    told = ", ".join(f"{r.phase.split()[0]} p95 {_ms(r.figures.latency.p95)}" for r in runs)
    failed = sum(sum(r.figures.failed.values()) for r in runs)
    return [
        {
            "claim": f"a sudden threefold load, {rate:.0f} to {rate * BURST:.0f} requests/s",
            "stated": "absorbed by SGLang's autoscaling",
            "measured": f"{told}; {failed} failed",
            "floor": None,
            "verdict": "SGLang has no autoscaling: a burst above the peak queues",
        }
    ]


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.3g} ms"
