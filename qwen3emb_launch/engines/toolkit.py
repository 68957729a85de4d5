"""The CUDA compiler for kernels that SGLang and its packages compile on first use.

They look for it as CUDA_HOME or CUDA_PATH, then nvcc on PATH, then /usr/local/cuda, and link with
`-L$CUDA_HOME/lib64 -lcudart -lcuda`. A machine without a toolkit uses the one that came with the engine's packages
(site-packages/nvidia/cu13). That lies in another shape, `lib` for `lib64` and no `libcudart.so`, so it is given the
usual one by links.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from qwen3emb_launch.engines.record import translated
from qwen3emb_launch.facts import Flavour

USUAL = Path("/usr/local/cuda")
_DRIVER_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib",
    "/run/opengl-driver/lib",
)  # fmt: skip


def launch_environment(
    flavour: Flavour,
    python: Path,
    site_packages: Path,
    folder: Path,
    cuda: str | None = None,
    plugin_path: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """What every start of this engine needs in its environment, beside the launcher's own.

    `cuda` is the CUDA version of its torch (`13.0`), `folder` where the links may lie. PATH leads to the environment's
    own `ninja`; CUDA_HOME is set only where SGLang would find no compiler that fits by itself.
    """
    outer = os.environ if environ is None else environ
    env = {"PYTHONPATH": str(plugin_path)} if plugin_path else {}
    if flavour == "cpu":
        return env | {"SGLANG_USE_CPU_ENGINE": "1"}
    env["PATH"] = f"{python.parent}{os.pathsep}{outer.get('PATH', os.defpath)}"
    major = (cuda or "13").split(".")[0]
    if _fits(found_by_itself(outer), major):
        return env
    own = site_packages / "nvidia" / f"cu{major}"
    if (own / "bin" / "nvcc").is_file():
        env["CUDA_HOME"] = str(arranged(own, folder / "cuda"))
    elif _fits(USUAL, major):
        env["CUDA_HOME"] = str(USUAL)
    return env


def found_by_itself(environ: Mapping[str, str]) -> Path:
    """The folder that SGLang would take for the toolkit, in its own order of search, right or wrong."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            return Path(environ[variable])
    nvcc = shutil.which("nvcc", path=environ.get("PATH", os.defpath))
    return Path(nvcc).parents[1] if nvcc else USUAL


def arranged(own: Path, target: Path) -> Path:
    """Lay links to the packages' toolkit in `target`, in the shape of a system one; what is right is left alone."""
    wanted = {name: own / name for name in ("bin", "include", "nvvm")}
    for library in sorted((own / "lib").glob("lib*")):
        wanted[f"lib64/{library.name}"] = library
        if library.name.startswith("libcudart.so."):
            wanted["lib64/libcudart.so"] = library
    driver = next((Path(f, "libcuda.so.1") for f in _DRIVER_FOLDERS if Path(f, "libcuda.so.1").exists()), None)
    if driver:
        wanted["lib64/stubs/libcuda.so"] = driver
    with translated(target):
        for name, source in wanted.items():
            _link(target / name, source)
    return target


def _link(link: Path, source: Path) -> None:
    if link.is_symlink() and link.readlink() == source:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(source)
    temporary.replace(link)


def _fits(root: Path, major: str) -> bool:
    """Whether a whole toolkit is there, not known to be of another major version. A lone nvcc on PATH is none."""
    if not ((root / "bin" / "nvcc").is_file() and (root / "include" / "cuda_runtime.h").is_file()):
        return False
    try:
        version = json.loads((root / "version.json").read_text(encoding="utf-8"))["cuda"]["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return str(version).split(".")[0] == major
