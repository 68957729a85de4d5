"""The GPU inventory against an NVML that answers, refuses and breaks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from qwen3emb_launch import gpu

GIB = 2**30


class Nvml:
    """Two GPUs; `broken` maps a function to the error number it ends in, `start` is nvmlInit's."""

    def __init__(self, broken: dict[str, int] | None = None, start: int | None = None, lost: int | None = None) -> None:
        self.broken = broken or {}
        self.start = start
        self.lost = lost
        self.shut = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Nvml:
        answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.65.06",
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda i: i,
            "nvmlDeviceGetName": lambda h: b"NVIDIA L4" if h == 0 else "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetUUID": lambda h: f"GPU-{h}aa",
            "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(total=24 * GIB, free=(20 + h) * GIB, used=4 * GIB),
            "nvmlDeviceGetCudaComputeCapability": lambda h: (8, 9) if h == 0 else (9, 0),
            "nvmlDeviceGetComputeRunningProcesses": lambda h: [
                SimpleNamespace(pid=1, usedGpuMemory=GIB),
                SimpleNamespace(pid=2**22 + 1, usedGpuMemory=3 * GIB),
            ],
            "nvmlDeviceGetGraphicsRunningProcesses": lambda h: [SimpleNamespace(pid=2**22 + 2, usedGpuMemory=None)],
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, self._call(name, answer))
        return self

    def _call(self, name: str, answer: Any) -> Any:
        def call(*args: Any) -> Any:
            if name == "nvmlInit" and self.start:
                raise pynvml.NVMLError(self.start)
            if name in self.broken or (name == "nvmlDeviceGetHandleByIndex" and args == (self.lost,)):
                raise pynvml.NVMLError(self.broken.get(name, pynvml.NVML_ERROR_GPU_IS_LOST))
            self.shut += name == "nvmlShutdown"
            return answer(*args)

        return call


def test_what_nvml_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, memory, compute capability and driver arrive as facts, and NVML is shut down again."""
    nvml = Nvml().install(monkeypatch)
    first, second = gpu.inventory({})
    assert (first.name, first.compute_capability, first.driver) == ("NVIDIA L4", (8, 9), "580.65.06")
    assert (second.total_bytes, second.free_bytes, second.uuid) == (24 * GIB, 21 * GIB, "GPU-1aa")
    assert nvml.shut == 1


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_no_driver_is_an_ordinary_answer(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """A machine without an NVIDIA driver has no GPUs, and nothing to note."""
    Nvml(start=error).install(monkeypatch)
    assert gpu.survey({}) == gpu.Survey(())
    assert gpu.holders(0) == []


def test_a_broken_nvml_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that does not match its library gives no GPUs and says so."""
    Nvml(start=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH).install(monkeypatch)
    told = gpu.survey({})
    assert told.gpus == ()
    assert "NVML does not start" in told.notes[0]


def test_a_lost_gpu_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU off the bus does not hide the others."""
    Nvml(lost=0).install(monkeypatch)
    told = gpu.survey({})
    assert [g.index for g in told.gpus] == [1]
    assert "GPU 0 is left out" in told.notes[0]


def test_what_nvml_does_not_say_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing driver version or compute capability is None, not a guess; unknown memory leaves the GPU out."""
    silent = {"nvmlSystemGetDriverVersion": 3, "nvmlDeviceGetCudaComputeCapability": 3}
    Nvml(silent).install(monkeypatch)
    assert [(g.driver, g.compute_capability) for g in gpu.inventory({})] == [(None, None)] * 2
    Nvml({"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}).install(monkeypatch)
    told = gpu.survey({})
    assert told.gpus == ()
    assert len(told.notes) == 2


@pytest.mark.parametrize(
    ("setting", "indices"),
    [("1", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("0,9,1", [0]), ("GPU-1aa", [1]), ("GPU-", []), ("0,0", [0])],
)
def test_cuda_visible_devices_is_honoured(monkeypatch: pytest.MonkeyPatch, setting: str, indices: list[int]) -> None:
    """The inventory holds what CUDA would see: listed GPUs in their order, up to the first that is none."""
    Nvml().install(monkeypatch)
    assert [g.index for g in gpu.inventory({"CUDA_VISIBLE_DEVICES": setting})] == indices


def test_who_holds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most first; a process of another container has no name, a size NVML hides is unknown."""
    Nvml().install(monkeypatch)
    held = gpu.holders(0)
    assert [(h.pid, h.bytes) for h in held] == [(2**22 + 1, 3 * GIB), (1, GIB), (2**22 + 2, None)]
    assert held[0].name is None
    assert held[1].name


def test_holders_of_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that NVML does not know has no holders."""
    Nvml(lost=7).install(monkeypatch)
    assert gpu.holders(7) == []
