"""NVIDIA GPUs, as NVML sees them. The only place that imports pynvml.

No driver and no GPU are ordinary answers (an empty inventory); an NVML that fails otherwise becomes a note, never an
exception. Indices are NVML's, in order of the PCI bus; CUDA counts alike only with CUDA_DEVICE_ORDER=PCI_BUS_ID.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qwen3emb_launch.facts import GpuFacts


@dataclass(frozen=True)
class Survey:
    """The GPUs and what went wrong while looking; notes are empty on a machine without any NVIDIA driver."""

    gpus: tuple[GpuFacts, ...]
    notes: tuple[str, ...] = ()
    driver: str | None = None


@dataclass(frozen=True)
class Holder:
    """A process that holds GPU memory. `name` and `bytes` are None where the system does not tell (containers)."""

    pid: int
    name: str | None
    bytes: int | None


@dataclass(frozen=True)
class GpuSample:
    """One reading. `busy` is 0 to 1, `joules` counts since the driver was loaded; None where the card is silent."""

    busy: float | None
    memory_bytes: int | None
    watts: float | None
    joules: float | None


def inventory(environ: Mapping[str, str] | None = None) -> list[GpuFacts]:
    """The GPUs that a process started now may use: all, or those that CUDA_VISIBLE_DEVICES names."""
    return list(survey(environ).gpus)


def survey(environ: Mapping[str, str] | None = None) -> Survey:
    """The GPUs with the notes: a driver that does not match its library, a GPU that has fallen off the bus."""
    visible = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    notes: list[str] = []
    with _nvml(notes) as nvml:
        if nvml is None:
            return Survey((), tuple(notes))
        driver = _text(_ask(nvml, nvml.nvmlSystemGetDriverVersion))
        count = _ask(nvml, nvml.nvmlDeviceGetCount, notes=notes, what="counting GPUs") or 0
        found = [_gpu(nvml, index, driver, notes) for index in range(count)]
        gpus = _visible([g for g in found if g], visible)
        return Survey(tuple(gpus), tuple(notes), driver)


def holders(index: int) -> list[Holder]:
    """Who holds memory of the GPU with this NVML index, most first; empty when NVML cannot say."""
    with _nvml([]) as nvml:
        if nvml is None:
            return []
        handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            return []
        held: dict[int, int | None] = {}
        for query in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            for process in _ask(nvml, query, handle) or ():
                held[process.pid] = process.usedGpuMemory
        found = [Holder(pid, _process_name(pid), size) for pid, size in held.items()]
        return sorted(found, key=lambda h: -(h.bytes or 0))


@contextmanager
def sampler(index: int) -> Iterator[Callable[[], GpuSample | None]]:
    """A function that reads the GPU with this NVML index, in about a millisecond; it gives None without one."""
    with _nvml([]) as nvml:
        handle = None if nvml is None else _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)

        def sample() -> GpuSample | None:
            if nvml is None or handle is None:
                return None
            rates = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
            memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
            milliwatts = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
            millijoules = _ask(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
            return GpuSample(
                busy=None if rates is None else rates.gpu / 100,
                memory_bytes=None if memory is None else int(memory.used),
                watts=None if milliwatts is None else milliwatts / 1000,
                joules=None if millijoules is None else millijoules / 1000,
            )

        yield sample


@contextmanager
def _nvml(notes: list[str]) -> Iterator[Any]:
    """pynvml, initialised, or None with a note unless there is simply no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        if exc.value not in absent:
            notes.append(f"NVML does not start: {exc}")
        yield None
        return
    try:
        yield pynvml
    finally:
        _ask(pynvml, pynvml.nvmlShutdown)


def _ask(nvml: Any, call: Callable[..., Any], *args: Any, notes: list[str] | None = None, what: str = "") -> Any:
    """One NVML call; None when it fails, noted if somebody listens."""
    try:
        return call(*args)
    except nvml.NVMLError as exc:
        if notes is not None:
            notes.append(f"NVML: {what}: {exc}")
        return None


def _gpu(nvml: Any, index: int, driver: str | None, notes: list[str]) -> GpuFacts | None:
    handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index, notes=notes, what=f"GPU {index} is left out")
    if handle is None:
        return None
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, notes=notes, what=f"memory of GPU {index}")
    if memory is None:
        return None
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    return GpuFacts(
        index=index,
        name=_text(_ask(nvml, nvml.nvmlDeviceGetName, handle)) or "NVIDIA GPU",
        uuid=_text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle)) or "",
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        compute_capability=tuple(capability) if capability else None,
        driver=driver,
    )


def _visible(gpus: list[GpuFacts], setting: str | None) -> list[GpuFacts]:
    """CUDA's own rule: the named ones in their order, up to the first name that is none of them."""
    if setting is None:
        return gpus
    chosen: list[GpuFacts] = []
    for word in (w.strip() for w in setting.split(",")):
        match = [
            g for g in gpus if word and (str(g.index) == word or (word.startswith("GPU-") and g.uuid.startswith(word)))
        ]
        if len(match) != 1 or match[0] in chosen:
            break
        chosen += match
    return chosen


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _process_name(pid: int) -> str | None:
    import psutil

    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return None
