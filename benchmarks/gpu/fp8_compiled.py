"""The plugin's float8 kernels as compiled for Hopper, without a GPU: what bounds them beside memory.

    PYTHONPATH=engine_plugin PYTHON benchmarks/gpu/fp8_compiled.py

Compiles the present kernels and those of `fp8_kernels.py` for sm_90 with Triton's own ptxas, and counts in what came
out: registers a thread, bytes spilled, warps that a multiprocessor holds at once (of 64), instructions and among them
special functions (exponentials, reciprocals) for each value of a row. Microseconds are what 15,903 rows take at least
by the issue of instructions (four warps a cycle) and by the special functions (16 results), on 132 multiprocessors at
1.485 GHz, which an H200 had under the bulk load. Needs torch and a Triton with its NVIDIA tools: any x86-64 wheel.
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
from fp8_kernels import SHAPES

ROWS = 15903
CLOCKS = 132 * 1.485e9  # cycles a second of all multiprocessors together
TILINGS = {"gate": ((2, 4), (4, 4), (4, 2), (8, 4), (16, 4)), "norm": ((1, 4), (2, 4), (4, 2), (4, 4), (8, 2))}


def main() -> None:
    import triton
    from qwen3emb_engine_plugin import fp8_kernels as new
    from qwen3emb_engine_plugin import kernels as present

    print(f"Triton {triton.__version__}")
    gate = {"gate_up": "*bf16", "out": "*fp8e4nv", "scales": "*fp32"}
    norm = dict.fromkeys(("hidden", "residual", "weight"), "*bf16")
    norm |= {"out": "*fp8e4nv", "scales": "*fp32", "eps": "fp32"}
    plain = {"values": "*bf16", "out": "*fp8e4nv", "scales": "*fp32"}

    def how(width: int, warps: int, words: int, exact: bool = False) -> dict[str, Any]:
        return {
            "WORDS": width // 2, "CHUNK": warps * 32 * words, "FP8_LARGEST": 448.0, "EVICT": "", "PLAIN": exact,
        }  # fmt: skip

    for name, shape in SHAPES.items():
        old = {"WIDTH": shape.inner, "BLOCK": triton.next_power_of_2(shape.inner), "FP8_LARGEST": 448.0}
        report(name, "gate_quantise", "present", shape.inner, compiled(present._gate_quantise, gate, old, 16))
        for warps, words in TILINGS["gate"]:
            found = compiled(new._gate_quantise, gate, how(shape.inner, warps, words), warps)
            report(name, "gate_quantise", f"{warps} x {words}", shape.inner, found)
        found = compiled(new._gate_quantise, gate, how(shape.inner, 8, 4, exact=True), 8)
        report(name, "gate_quantise", "8 x 4, plain", shape.inner, found)
        old = {"WIDTH": shape.hidden, "BLOCK": triton.next_power_of_2(shape.hidden), "FP8_LARGEST": 448.0, "ADD": True}
        report(name, "norm_quantise", "present", shape.hidden, compiled(present._norm_quantise, norm, old, 8))
        for warps, words in TILINGS["norm"]:
            found = compiled(new._norm_quantise, norm, {**how(shape.hidden, warps, words), "ADD": True}, warps)
            report(name, "norm_quantise", f"{warps} x {words}", shape.hidden, found)
        for warps in (1, 2, 4, 8):
            found = compiled(new._quantise, plain, how(shape.queries, warps, 4), warps)
            report(name, "quantise", f"{warps} x 4", shape.queries, found)


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


def report(shape: str, work: str, way: str, width: int, kernel: Any) -> None:
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
        f"{shape:5} {work:14} {way:13} {registers:4} registers {spilled:3} spilled "
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
