"""Compile every kernel variant ahead of time and read what came out: no GPU is needed.

    python -m rankonce.benchmarks.machine_code --output RECORD
    python -m rankonce.benchmarks.machine_code --record RECORD --page docs/kernels.md

Registers and spills are what ``ptxas`` reports for the PTX that Triton made; they differ between
versions of Triton, so the record names the version.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankonce.benchmarks.pages import update_page
from rankonce.benchmarks.records import write_record
from rankonce.environment import describe_environment
from rankonce.errors import RankOnceError

# Shared memory of one block, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
_TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """What one variant compiled to.

    Attributes:
        capability: 80, 90 or 100.
        spill_bytes: stores and loads of spilled registers together.
        shared_bytes: shared memory of a block.
        tensor_core: the tensor-core instruction found, if any.
        missing: expected instructions that are not there (judged on sm_90).
    """

    name: str
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int
    tensor_core: str | None
    missing: tuple[str, ...]


def all_variants() -> list[Any]:
    """Collect the variants of every kernel folder."""
    from rankonce.kernels.fp8_linear import triton as fp8_linear
    from rankonce.kernels.fused_norm import triton as fused_norm
    from rankonce.kernels.label_logprobs import triton as label_logprobs
    from rankonce.kernels.segment_attention import variants as segment_attention

    modules = (segment_attention, label_logprobs, fused_norm, fp8_linear)
    return [variant for module in modules for variant in module.machine_code_variants()]


def compile_variant(variant: Any, capability: int) -> MachineCode:
    """Compile one variant for a chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    divisible = [
        (place,)
        for place, name in enumerate(names)
        if signature[name].startswith("*") or "stride" in name
    ]
    source = ASTSource(
        variant.kernel,
        signature,
        dict(variant.constexprs),
        {place: [["tt.divisibility", 16]] for place in divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx, capability)
    # Newer chips run what older ones have, so any of them may be there.
    found = [name for name in _TENSOR_CORES.values() if name in ptx]
    return MachineCode(
        name=variant.name,
        capability=capability,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        tensor_core=found[-1] if found else None,
        missing=tuple(e for e in variant.expects if capability == 90 and e not in ptx),
    )


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Return registers and spilled bytes that ptxas reports."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={_ARCHITECTURES[capability]}", str(source)]
        result = subprocess.run(
            [*command, "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", result.stderr)
    stores = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    if registers is None or stores is None:
        raise RuntimeError(f"ptxas said nothing of registers: {result.stderr}")
    return int(registers[1]), int(stores[1]) + int(stores[2])


def render(record: dict[str, Any]) -> str:
    """Return the table of a record: registers, spilled bytes and shared memory by chip."""
    capabilities = sorted({row["capability"] for row in record["kernels"]})
    cells: dict[str, dict[int, str]] = {}
    for row in record["kernels"]:
        spilled = f" + {row['spill_bytes']} B spilled" if row["spill_bytes"] else ""
        unit = (row["tensor_core"] or "–").split(".")[0]
        shared = f"{row['shared_bytes'] / 1024:.0f} KiB"
        cells.setdefault(row["name"], {})[row["capability"]] = (
            f"{row['registers']}{spilled}, {shared}, {unit}"
        )
    lines = [
        f"Triton {record['triton']}, commit {record['environment']['commit']}: registers a thread, "
        "shared memory a block, tensor-core instruction.",
        "",
        f"| kernel | {' | '.join(f'sm_{one}' for one in capabilities)} |",
        f"| --- |{' --- |' * len(capabilities)}",
    ]
    for name, found in cells.items():
        lines.append(f"| {name} | {' | '.join(found.get(one, '–') for one in capabilities)} |")
    return "\n".join(lines)


def compile_all(capabilities: Sequence[int], only: str = "") -> dict[str, Any]:
    """Compile every variant whose name contains ``only`` for the chips that it is for."""
    import triton
    from tqdm import tqdm

    jobs = [
        (variant, capability)
        for capability in capabilities
        for variant in all_variants()
        if variant.min_capability <= capability <= variant.max_capability and only in variant.name
    ]
    rows = [asdict(compile_variant(*job)) for job in tqdm(jobs, desc="compiling", disable=None)]
    return {
        "environment": describe_environment(),
        "triton": triton.__version__,
        "kernels": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything and write the record; or write a record's table into a page."""
    parser = argparse.ArgumentParser(
        prog="python -m rankonce.benchmarks.machine_code",
        description="Compile every kernel ahead of time; no GPU is needed.",
    )
    parser.add_argument("--capability", type=int, nargs="+", choices=[80, 90, 100])
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--output", type=Path, help="write the record to this file")
    parser.add_argument("--record", type=Path, help="compile nothing, read this record")
    parser.add_argument("--page", type=Path, help="Markdown with <!-- begin: machine code -->")
    options = parser.parse_args(arguments)
    try:
        if options.record:
            record = json.loads(options.record.read_text())
        elif os.environ.get("TRITON_INTERPRET") == "1":
            parser.error("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled")
        else:
            record = compile_all(options.capability or (80, 90, 100), options.only)
        if options.output:
            write_record(options.output, record)
        if options.page:
            table = render(record)
            update_page(options.page, {"machine code": table}.get, example="machine code")
        if not (options.output or options.page):
            print(render(record))
    except (RankOnceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
