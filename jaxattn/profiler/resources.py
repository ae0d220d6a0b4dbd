"""What compiled GPU kernels take of a core: registers, spills, shared memory, and how many blocks fit.

Read from the PTX that XLA hands to NVIDIA's assembler and from what that assembler says of it, so that a
tuning space can be cut before a GPU is there.
"""

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

from jaxattn.profiler import program, targets
from jaxattn.profiler.compile import Compiled, compile_for, find_wheels
from jaxattn.profiler.targets import Target

_REGISTERS_PER_CORE = 65536
_BLOCKS_PER_CORE = 32
_SYSTEM_SHARED_BYTES = 1024  # what the driver reserves of each block's shared memory, since sm_80


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """One kernel of a compiled program.

    `wgmma` and `mma` count tensor-core instructions in the code (not executions): warp-group ones (Hopper)
    and warp ones. `serialized` is true where the assembler says that this kernel's wgmma lost its overlap
    (C7511 and its like).
    `blocks_per_core` is how many blocks a core holds at once, `limit` what stops one more.
    """

    name: str
    grid: tuple[int, int, int]
    threads: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    serialized: bool
    blocks_per_core: int
    limit: str
    occupancy: float

    def __str__(self) -> str:
        return (
            f"{self.name}: grid {self.grid} x {self.threads} threads, {self.registers} registers, "
            f"{self.spill_store_bytes} bytes spilled, {self.shared_bytes} bytes shared, "
            f"{self.wgmma} wgmma, {self.mma} mma{', serialized' if self.serialized else ''}, "
            f"{self.blocks_per_core} blocks per core ({self.limit}), occupancy {self.occupancy:.0%}"
        )


def kernel_resources(
    fn, *args, target: str = "h200", wheels: Path | str | None = None, options: dict | None = None
) -> tuple[KernelResources, ...]:
    """Compiles `fn` for a GPU that need not be there and says what each of its kernels takes.

    Args:
        fn: a jittable function; Pallas kernels in it are compiled even where they ask to be interpreted.
        *args: pytrees of arrays or `jax.ShapeDtypeStruct`; no values are used.
        target: `h200`, `h100`, `a100`, ...
        wheels: folder of the compile wheels (`python -m jaxattn.profiler wheels`).
        options: further XLA options, e.g. `{"xla_gpu_fail_ptx_compilation_on_register_spilling": True}`.

    Returns:
        One entry per kernel, in launch order of first appearance.

    Raises:
        FileNotFoundError: if the compile wheels are not there.
        RuntimeError: if the compiler or the assembler fails.

    Example:
        >>> kernel_resources(lambda x: x @ x, jax.ShapeDtypeStruct((512, 512), "bfloat16"))  # doctest: +SKIP
    """
    device = targets.get(target)
    find_wheels(wheels)
    lowered = program.trace(fn, args, device).lower_for_cuda(device)
    return resources_of(compile_for(lowered, device, wheels, options), device, wheels)


def resources_of(
    compiled: Compiled, target: Target, wheels: Path | str | None = None, names: set[str] | None = None
) -> tuple[KernelResources, ...]:
    """The same for a program that is already compiled; with `names`, for these kernels alone."""
    ptxas = find_wheels(wheels) / "nvidia" / "cu13" / "bin" / "ptxas"
    launches = _launches(compiled.launches)
    found = {}
    for ptx in compiled.ptx:
        for name, code in _entries(ptx).items():
            if name in launches and (names is None or name in names):
                found[name] = (ptx, code)
    said = _assemble(ptxas, target.arch, [ptx for ptx, _ in found.values()])
    order = [name for name in launches if name in found]
    return tuple(_resources(name, *found[name], said[found[name][0]], launches[name], target) for name in order)


def _launches(text: str) -> dict[str, tuple[tuple[int, int, int], int, int]]:
    """Kernel name -> (grid, threads per block, shared bytes per block), in launch order."""
    pattern = r"(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\].*?shared_memory: (\d+)"
    out = {}
    for name, *numbers in re.findall(pattern, text):
        x, y, z, tx, ty, tz, shared = map(int, numbers)
        out.setdefault(name, ((x, y, z), tx * ty * tz, shared))
    return out


def _entries(ptx: str) -> dict[str, str]:
    """Kernel name -> its PTX code."""
    parts = re.split(r"^\.visible \.entry (\w+)", ptx, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _assemble(ptxas: Path, arch: str, sources: list[str]) -> dict[str, str]:
    said = {}
    with tempfile.TemporaryDirectory(prefix="jaxattn-ptxas-") as folder:
        for source in dict.fromkeys(sources):
            path = Path(folder) / "kernel.ptx"
            path.write_text(source)
            command = [str(ptxas), "-v", f"-arch={arch}", "-o", str(path.with_suffix(".cubin")), str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"ptxas failed: {done.stderr.strip()[-2000:]}")
            said[source] = done.stderr + done.stdout
    return said


def _resources(name, ptx, code, said, launch, target: Target) -> KernelResources:
    grid, threads, shared = launch
    section = re.search(rf"Function properties for {name}\b(.*?)(?=Function properties for|\Z)", said, re.DOTALL)
    compiled_for = re.search(rf"Compiling entry function '{name}'.*?Used (\d+) registers", said, re.DOTALL)
    if not section or not compiled_for:
        raise RuntimeError(f"ptxas said nothing of {name}: {said.strip()[-500:]}")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", section.group(1))
    static = re.search(r"(\d+) bytes smem", section.group(1))
    registers = int(compiled_for.group(1))
    shared += int(static.group(1)) if static else 0
    blocks, limit = _blocks_per_core(threads, registers, shared, target)
    return KernelResources(
        name=name,
        grid=grid,
        threads=threads,
        registers=registers,
        spill_store_bytes=int(spills.group(1)),
        spill_load_bytes=int(spills.group(2)),
        shared_bytes=shared,
        wgmma=len(re.findall(r"\bwgmma\.mma_async", code)),
        mma=len(re.findall(r"\bmma\.sync|\btcgen05\.mma", code)),
        serialized=re.search(rf"wgmma.* serialized .*function '{name}'", said) is not None,
        blocks_per_core=blocks,
        limit=limit,
        occupancy=blocks * threads / target.threads_per_core,
    )


def _blocks_per_core(threads: int, registers: int, shared: int, target: Target) -> tuple[int, str]:
    """Registers are handed out in eights per thread, by warp; shared memory with the driver's part."""
    warps = -(-threads // 32)
    registers_per_block = -(-registers // 8) * 8 * 32 * warps
    reserve = _SYSTEM_SHARED_BYTES if target.capability >= (8, 0) else 0
    fits = {
        "threads": target.threads_per_core // (warps * 32),
        "registers": _REGISTERS_PER_CORE // registers_per_block,
        "shared memory": target.shared_bytes_per_core // (shared + reserve) if shared + reserve else 99,
        "blocks": _BLOCKS_PER_CORE,
    }
    limit = min(fits, key=fits.get)
    return fits[limit], limit
