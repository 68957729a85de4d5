"""What SGLang's modules ask of the GPU while they are imported, answered without touching CUDA.

A process that has initialised CUDA cannot fork children that use it, and importing SGLang asks torch for the card's
compute capability and name. NVML knows both and leaves CUDA alone. The stand-ins last as long as the import; whether
CUDA stayed untouched is asked of the driver afterwards, not assumed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

CUDA_ERROR_NOT_INITIALIZED = 3


def cuda_untouched() -> bool:
    """Whether nothing in this process has initialised the CUDA driver; True where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    count = ctypes.c_int()
    return int(driver.cuDeviceGetCount(ctypes.byref(count))) == CUDA_ERROR_NOT_INITIALIZED


@contextmanager
def answered_by_nvml() -> Iterator[None]:
    """Let `torch.cuda`'s questions about the first visible card be answered by NVML while this lasts.

    Does nothing where torch was built without CUDA or NVML finds no card.
    """
    import torch

    facts = first_visible_card() if torch.version.cuda else None
    if facts is None:
        yield
        return
    stand_ins: dict[str, Any] = {
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (facts.major, facts.minor),
        "get_device_name": lambda device=None: facts.name,
        "get_device_properties": lambda device=None: facts,
        "is_available": lambda: True,
    }
    places: list[tuple[Any, str, Any]] = [(torch.cuda, name, stand_in) for name, stand_in in stand_ins.items()]
    # `torch.get_device_module()` asks it (under either name), and finding an accelerator initialises one.
    names = [name for name in ("_get_accelerator", "_accelerator_getAccelerator") if hasattr(torch._C, name)]
    places += [(torch._C, name, lambda *_: torch.device("cuda")) for name in names]
    stock = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, stand_in in places:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, function in stock:
            setattr(module, name, function)


def first_visible_card() -> SimpleNamespace | None:
    """Compute capability, name and memory of the card that CUDA would call 0, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no NVML binding, no driver
        return None
    try:
        handle = _handle(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return SimpleNamespace(
            major=major,
            minor=minor,
            name=str(pynvml.nvmlDeviceGetName(handle)),
            total_memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        )
    except Exception:  # an index that is not there, a MIG slice: let the stock start deal with it
        return None
    finally:
        pynvml.nvmlShutdown()


def _handle(pynvml: Any, visible: str | None) -> Any:
    first = (visible or "0").split(",")[0].strip()
    return (
        pynvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(first)
    )
