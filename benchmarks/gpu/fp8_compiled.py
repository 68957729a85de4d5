"""The plugin's float8 kernels as compiled for Hopper, without a GPU: what bounds them beside memory.

    PYTHONPATH=engine_plugin PYTHON benchmarks/gpu/fp8_compiled.py

Compiles them for sm_90 with Triton's own ptxas, those of `fp8_kernels.py` with several numbers of warps a row, and
counts in what came out: registers a thread, bytes spilled, warps that a multiprocessor holds at once (of 64),
instructions and among them special functions (exponentials, reciprocals) for each value of a row. Microseconds are what
15,903 rows take at least by the issue of instructions (four warps a cycle) and by the special functions (16 results),
on 132 multiprocessors at 1.485 GHz, which an H200 had under the bulk load. Needs torch and a Triton with its NVIDIA
tools: any x86-64 wheel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from fp8_kernels import SHAPES, WARPS

ROWS = 15903
CLOCKS = 132 * 1.485e9  # cycles a second of all multiprocessors together
HIDDEN = {"0.6b": 1024, "4b": 2560, "8b": 4096}  # of a norm's row


def main() -> None:
    import triton
    from qwen3emb_engine_plugin import fp8_kernels, kernels

    print(f"Triton {triton.__version__}")
    out = {"out": "*fp8e4nv", "scales": "*fp32"}
    norm = dict.fromkeys(("hidden", "residual", "weight"), "*bf16") | out | {"eps": "fp32"}

    def chunks(width: int, warps: int) -> dict[str, Any]:
        chunk = warps * 32 * fp8_kernels.WORDS_A_THREAD
        return {"WORDS": width // 2, "CHUNK": chunk, "FP8_LARGEST": kernels.FP8_MAX}

    for name, shape in SHAPES.items():
        for work, width, kernel, source in (
            ("gate_quantise", shape.inner, fp8_kernels._gate_quantise, "gate_up"),
            ("quantise", shape.queries, fp8_kernels._quantise, "values"),
        ):
            for warps in WARPS:
                report(name, work, width, compiled(kernel, {source: "*bf16", **out}, chunks(width, warps), warps))
        width = HIDDEN[name]
        lanes = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "FP8_LARGEST": kernels.FP8_MAX, "ADD": True}
        report(name, "norm_quantise", width, compiled(kernels._norm_quantise, norm, lanes, 8))


def compiled(function: Any, signature: dict[str, str], constants: dict[str, Any], warps: int) -> Any:
    """A kernel for sm_90, with pointers as torch allocates."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    source = ASTSource(
        function,
        {name: "constexpr" if name in constants else signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def report(shape: str, work: str, width: int, kernel: Any) -> None:
    usage = tool("cuobjdump", "-res-usage", kernel.asm["cubin"])
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    registers, spilled = map(int, match.groups())
    warps = kernel.metadata.num_warps
    listing = tool("nvdisasm", "-c", kernel.asm["cubin"])
    found = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z]\w*)", listing, re.MULTILINE))
    each = warps * 32 / width  # of one instruction of the program, for each value of the row
    instructions = (found.total() - found["NOP"] - found["BRA"] - found["EXIT"]) * each
    special = found["MUFU"] * each
    issue, functions = (1e6 * ROWS * width * n / CLOCKS / rate for n, rate in ((instructions, 128), (special, 16)))
    print(
        f"{shape:5} {work:14} {warps:2} a row {registers:4} registers {spilled:3} spilled "
        f"{resident(registers, warps, kernel.metadata.shared):3} warps {instructions:6.1f} instructions "
        f"{special:5.2f} special a value: {issue:4.0f} and {functions:4.0f} us",
        flush=True,
    )


def resident(registers: int, warps: int, shared: int) -> int:
    """Warps on one multiprocessor: 16,384 registers for each of its four quarters, 32 blocks, 228 kB shared."""
    by_registers = 16384 // (32 * (-(-registers // 8) * 8)) * 4 // warps
    return warps * min(32, 64 // warps, by_registers, 228 * 1024 // (shared + 1024))


def tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tools / name, option, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
