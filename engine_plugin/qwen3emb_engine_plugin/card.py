"""What SGLang's modules ask of the GPU while they are imported, answered without touching CUDA.

A process that has initialised CUDA cannot fork children that use it, and importing SGLang asks for the card's name,
compute capability and multiprocessors: by torch, and by CUDA's driver where CUTLASS's Python package is installed.
NVML knows them and leaves CUDA alone. The stand-ins last as long as the import; a property or an attribute that they do
not know is asked of the card itself. Whether CUDA stayed untouched is asked of the driver afterwards, not assumed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

CUDA_ERROR_NOT_INITIALIZED = 3
Place = tuple[Any, str, Any]  # a module, a name in it, and what stands there meanwhile


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
    """While this lasts, NVML answers what is asked of the first visible card by `torch.cuda` and the driver.

    Does nothing where torch was built without CUDA or NVML finds no card.
    """
    import torch

    facts = first_visible_card() if torch.version.cuda else None
    places = [*_of_torch(facts), *_of_driver(facts)] if facts else []
    stock = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, stand_in in places:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, function in stock:
            setattr(module, name, function)


class _Properties:
    """torch's properties of a card: what NVML said of it, and the rest as ever, which initialises CUDA."""

    def __init__(self, facts: SimpleNamespace, stock: Any) -> None:
        self.__dict__.update(vars(facts))
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy asks for these before `_stock` is there
            raise AttributeError(name)
        return getattr(self._stock(0), name)


def _of_torch(facts: SimpleNamespace) -> list[Place]:
    import torch

    properties = _Properties(facts, torch.cuda.get_device_properties)
    stand_ins: dict[str, Any] = {
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (facts.major, facts.minor),
        "get_device_name": lambda device=None: facts.name,
        "get_device_properties": lambda device=None: properties,
        "is_available": lambda: True,
    }
    places: list[Place] = [(torch.cuda, name, stand_in) for name, stand_in in stand_ins.items()]
    # `torch.get_device_module()` asks it (under either name), and finding an accelerator initialises one.
    names = [name for name in ("_get_accelerator", "_accelerator_getAccelerator") if hasattr(torch._C, name)]
    return places + [(torch._C, name, lambda *_: torch.device("cuda")) for name in names]


def _of_driver(facts: SimpleNamespace) -> list[Place]:
    """cuda-python's driver, which CUTLASS asks for the compute capability, even where CUTE_DSL_ARCH tells it."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return []
    fine, attribute = driver.CUresult.CUDA_SUCCESS, driver.CUdevice_attribute
    known = {
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: facts.major,
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: facts.minor,
    }
    begin, ask = driver.cuInit, driver.cuDeviceGetAttribute

    def answer(wanted: Any, device: Any) -> Any:
        if wanted in known:
            return fine, known[wanted]
        begin(0)
        return ask(wanted, device)

    return [
        (driver, "cuInit", lambda _flags: (fine,)),
        (driver, "cuDeviceGet", lambda number: (fine, driver.CUdevice(number))),
        (driver, "cuDeviceGetAttribute", answer),
    ]


def first_visible_card() -> SimpleNamespace | None:
    """Compute capability, name and memory of the card that CUDA would call 0, and its multiprocessors; or None.

    An old driver or binding does not count cores: `multi_processor_count` is left out then. A start asks several times,
    NVML is begun once.
    """
    return _first_of(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER"))


@cache
def _first_of(visible: str | None, order: str | None) -> SimpleNamespace | None:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no NVML binding, no driver
        return None
    try:
        handle = _handle(pynvml, visible, order)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        if _sliced(pynvml, handle):
            return None
        card = SimpleNamespace(
            major=major,
            minor=minor,
            name=str(pynvml.nvmlDeviceGetName(handle)),
            total_memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        )
        with suppress(pynvml.NVMLError, AttributeError):
            card.multi_processor_count = pynvml.nvmlDeviceGetNumGpuCores(handle) // _cores_of_one(major, minor)
        return card
    except Exception:  # an index that is not there, unlike cards: let the stock start deal with it
        return None
    finally:
        pynvml.nvmlShutdown()


def _sliced(pynvml: Any, handle: Any) -> bool:
    """Whether CUDA's card is a MIG slice of this one, whose memory and multiprocessors are fewer."""
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    except (pynvml.NVMLError, AttributeError):  # most cards have no such mode
        return False


def _cores_of_one(major: int, minor: int) -> int:
    """CUDA cores of one multiprocessor: NVML counts the cores, CUDA the multiprocessors."""
    return 64 if major == 7 or (major, minor) == (8, 0) else 128


def _handle(pynvml: Any, visible: str | None, order: str | None) -> Any:
    first = "0" if visible is None else visible.split(",")[0].strip()
    if not first.isdecimal():  # nor when the list is empty: CUDA has no card then, and NVML finds none of that name
        return pynvml.nvmlDeviceGetHandleByUUID(first)
    # NVML counts cards by their slots, CUDA the fastest first: of unlike ones an index says nothing.
    cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    if order != "PCI_BUS_ID" and len(set(map(pynvml.nvmlDeviceGetName, cards))) > 1:
        raise LookupError(f"which of {len(cards)} unlike cards is CUDA's {first}")
    return cards[int(first)]
