"""Driver, cards, memory and who holds it, compute capability, devices, and the compiler for first-use kernels."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen3emb_launch import gpu
from qwen3emb_launch.doctor.report import Check, fail, ok, unknown, warn
from qwen3emb_launch.facts import EngineFacts, GpuFacts
from qwen3emb_launch.gpu import Holder, Survey

LOWEST = (8, 0)  # bfloat16 arithmetic
HELD = 0.05  # of a card's memory: less than that is the driver's own
# CUDA's major version -> the oldest driver that runs it. NVIDIA, "CUDA Compatibility", minor version compatibility.
DRIVERS: Mapping[int, tuple[int, ...]] = {12: (525, 60, 13), 13: (580, 65, 6)}
NVIDIA = "0x10de"
DEVICES = ("/dev/nvidiactl", "/dev/nvidia-uvm")
USUAL_TOOLKIT = Path("/usr/local/cuda")


def checks(engine: EngineFacts | None, cuda_build: str | None) -> list[Check]:
    """All of them. `engine` is the CUDA engine there is, `cuda_build` what its torch was built for."""
    survey = gpu.survey()
    found = [driver(survey, pci_cards())]
    if not survey.gpus:
        return found
    found.append(cuda(survey.driver, cuda_build, engine))
    for card in survey.gpus:
        found += [capability(card), memory(card, gpu.holders(card.index))]
    found.append(devices({path: _access(path) for path in DEVICES}))
    if engine:
        found.append(compiler(engine.environment, os.environ, shutil.which("c++") or shutil.which("g++")))
    return found


def pci_cards() -> int | None:
    """NVIDIA display controllers on the PCI bus, driver or not; None where the bus cannot be seen."""
    try:
        entries = list(Path("/sys/bus/pci/devices").iterdir())
    except OSError:
        return None
    count = 0
    for entry in entries:
        try:
            vendor = (entry / "vendor").read_text().strip()
            kind = (entry / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == NVIDIA and kind.startswith("0x03")
    return count


def driver(survey: Survey, on_bus: int | None) -> Check:
    """Whether the driver and its library work."""
    if survey.notes:
        says = "; ".join(survey.notes)
        return fail("gpu driver", says, "nvidia-smi; after a driver update the kernel module is the old one: reboot")
    if survey.gpus:
        names = ", ".join(card.name for card in survey.gpus)
        return ok("gpu driver", f"{survey.driver or 'of unknown version'}; {names}")
    if survey.driver:
        return warn(
            "gpu driver",
            f"{survey.driver} is loaded, and shows this process no GPU",
            "is CUDA_VISIBLE_DEVICES set? in a container: run it with --gpus all",
        )
    if on_bus:
        return fail(
            "gpu driver",
            f"{on_bus} NVIDIA card(s) on the PCI bus and no driver",
            "install it: apt install nvidia-driver, or nvidia.com/drivers; in a container: --gpus all",
        )
    return ok("gpu driver", "no NVIDIA GPU: the cpu and demo profiles serve here")


def cuda(installed: str | None, build: str | None, engine: EngineFacts | None) -> Check:
    """Whether the driver runs the CUDA that the engine was built for."""
    if engine is None:
        return unknown("cuda", "no cuda engine is installed to compare the driver with", "qwen3emb engine install cuda")
    if installed is None or build is None:
        return unknown(
            "cuda", f"driver {installed or '?'}, engine {engine.name} built for CUDA {build or '?'}", "nvidia-smi"
        )
    least = DRIVERS.get(int(build.split(".")[0]))
    have = tuple(int(n) for n in re.findall(r"\d+", installed)[:3])
    if least is None:
        return unknown("cuda", f"driver {installed}; which one CUDA {build} needs is not known here", "nvidia-smi")
    wanted = ".".join(map(str, least))
    if have < least:
        return fail(
            "cuda",
            f"driver {installed} is too old: engine {engine.name} is built for CUDA {build}, which needs {wanted}",
            f"install driver {least[0]} or later",
        )
    return ok("cuda", f"driver {installed} runs CUDA {build} (from {wanted})")


def capability(card: GpuFacts) -> Check:
    """Whether the engine has kernels for the card."""
    name = f"gpu {card.index} capability"
    if card.compute_capability is None:
        return unknown(name, f"{card.name} does not tell its compute capability", "nvidia-smi")
    text = ".".join(map(str, card.compute_capability))
    if card.compute_capability < LOWEST:
        return fail(
            name,
            f"{card.name} has compute capability {text}; bfloat16, which the models need, starts at 8.0",
            "qwen3emb up --profile cpu, or a GPU of the Ampere generation or later",
        )
    return ok(name, f"{card.name}: {text}")


def memory(card: GpuFacts, holders: Sequence[Holder]) -> Check:
    """How much memory is free, and who holds the rest."""
    name = f"gpu {card.index} memory"
    says = f"{_gib(card.free_bytes)} free of {_gib(card.total_bytes)}"
    if card.free_bytes >= (1 - HELD) * card.total_bytes:
        return ok(name, says)
    if not holders:
        return warn(name, f"{says}; who holds the rest is not told here", "nvidia-smi on the host")
    held = ", ".join(f"pid {h.pid} ({h.name or '?'}, {_gib(h.bytes) if h.bytes else '?'})" for h in holders[:5])
    return warn(name, f"{says}; held by {held}", "qwen3emb status; qwen3emb down, or end those processes")


def devices(access: Mapping[str, bool | None]) -> Check:
    """Whether this user may use the device files; None: it is not there."""
    missing = [path for path, allowed in access.items() if allowed is None]
    refused = [path for path, allowed in access.items() if allowed is False]
    if refused:
        return fail("gpu devices", f"no right to use {', '.join(refused)}", f"ls -l {' '.join(refused)}")
    if missing:
        return fail("gpu devices", f"{', '.join(missing)} not there", "sudo nvidia-modprobe -c 0 -u")
    return ok("gpu devices", ", ".join(access))


def compiler(engine: Mapping[str, str], environ: Mapping[str, str], host: str | None) -> Check:
    """Kernels are compiled on first use: nvcc where the engine looks for it, and a C++ compiler under it."""
    root = next(
        (Path(env[name]) for env in (engine, environ) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)), None
    )
    if root is None:
        on_path = shutil.which("nvcc", path=environ.get("PATH", os.defpath))
        root = Path(on_path).parents[1] if on_path else USUAL_TOOLKIT
    if not (root / "bin" / "nvcc").is_file():
        return fail(
            "compiler",
            f"no nvcc in {root}: kernels that are compiled on first use fail",
            "qwen3emb engine install cuda --force brings one, or set CUDA_HOME to a toolkit",
        )
    if host is None:
        return fail("compiler", f"nvcc of {root} needs a C++ compiler, and there is none", "apt install g++")
    return ok("compiler", f"nvcc of {root}, {host}")


def _access(path: str) -> bool | None:
    return os.access(path, os.R_OK | os.W_OK) if Path(path).exists() else None


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
