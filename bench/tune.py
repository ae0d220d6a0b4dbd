"""`python -m bench tune`: tilings for the Triton kernels, cut by what the compiler says, then measured on a GPU.

Design fact: what a tiling costs in registers and shared memory is known without a GPU, by compiling for one. Most of
the space falls away there, so a GPU measures only what can win; without one a rule picks from the same facts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from bench import environment
from jaxattn import Causal, Full, dot_product_attention
from jaxattn.impl.triton import Tiling, Triton, default_tiling
from jaxattn.profiler import resources, targets

FACTS = Path(__file__).parent / "results" / "triton_compile_facts.json"
TABLE = Path(__file__).parent.parent / "jaxattn" / "impl" / "triton_table.json"
TARGETS = {"9.0": "h100", "8.0": "a100"}
KERNELS = ("forward", "decode", "dq", "dkv")
HEAD_DIMS = (64, 128, 256)
SPACE = {  # (kernel, head dim): block_q/block_k/warps and numbers of stages
    ("forward", 64): [
        ("128/64/4", (2, 3, 4)),
        ("128/64/8", (2, 3)),
        ("128/128/8", (2, 3)),
        ("64/64/4", (3,)),
        ("64/128/4", (3,)),
    ],
    ("forward", 128): [("128/64/8", (2, 3)), ("128/128/8", (2,)), ("64/64/4", (2, 3)), ("64/128/4", (2,))],
    ("forward", 256): [("128/32/8", (2, 3)), ("128/64/8", (2,)), ("64/32/4", (2, 3)), ("64/64/4", (2,))],
    ("decode", 64): [("16/64/4", (3, 4)), ("16/128/4", (2, 3, 4))],
    ("decode", 128): [("16/64/4", (2, 3, 4)), ("16/128/4", (2,))],
    ("decode", 256): [("16/32/4", (2, 3)), ("16/64/4", (2,))],
    ("dq", 64): [("128/64/8", (2, 3)), ("128/128/8", (2,)), ("64/64/4", (2, 3)), ("64/128/4", (2,))],
    ("dq", 128): [("128/64/8", (2,)), ("128/32/8", (2, 3)), ("64/64/4", (2,)), ("64/32/4", (2, 3))],
    ("dq", 256): [("128/32/8", (2,)), ("64/64/8", (2,)), ("64/32/4", (2,)), ("64/32/8", (2,))],
    ("dkv", 64): [
        ("64/128/8", (2,)),
        ("32/128/8", (2, 3)),
        ("64/64/8", (2,)),
        ("64/64/4", (2, 3)),
        ("32/64/4", (2, 3)),
    ],
    ("dkv", 128): [("64/128/8", (2,)), ("32/128/8", (2,)), ("64/64/8", (2,)), ("64/64/4", (2,)), ("32/64/4", (2, 3))],
    ("dkv", 256): [("64/64/8", (2,)), ("32/64/8", (2,)), ("16/64/8", (2,)), ("32/128/8", (2,))],
}


def main(argv: list[str]) -> int:
    """Tune on the GPU that is here, or with --facts for compute capabilities 9.0 and 8.0 without one."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=main.__doc__)
    parser.add_argument("--facts", action="store_true", help="compile every tiling, write the facts and pick by rule")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="with --facts: only this; may be repeated")
    parser.add_argument("--pick", action="store_true", help="pick again by rule from the facts that are there")
    parser.add_argument("--wheels", type=Path, help="folder of the compile wheels, where not the usual one")
    parser.add_argument("--minutes", type=float, default=0.8, help="time to measure in; what matters most comes first")
    parser.add_argument("--write", action="store_true", help="write what was measured into the table that ships")
    arguments = parser.parse_args(argv)
    if arguments.facts or arguments.pick:
        facts = read(FACTS) if arguments.pick else all_facts(arguments.kernel or KERNELS, arguments.wheels)
        write_facts(facts)
        write_table([*pick(facts), *(row for row in read(TABLE) if row["device"] not in TARGETS)])
        print(f"Facts: {FACTS}\nTable: {TABLE}")
        return 0
    if jax.default_backend() != "gpu":
        print("No GPU to measure on. --facts compiles for GPUs that are not here.", file=sys.stderr)
        return 2
    rows = measure(read(FACTS), arguments.minutes * 60)
    if arguments.write:
        write_table([*(row for row in read(TABLE) if not any(same_row(row, new) for new in rows)), *rows])
        print(f"Table: {TABLE}")
    return 0


def space(kernel: str, head_dim: int) -> tuple[Tiling, ...]:
    """The tilings worth compiling: accumulators that registers may hold, at least 64 rows for wgmma."""
    return tuple(
        Tiling(*map(int, blocks.split("/")), num_stages)
        for blocks, stages in SPACE[kernel, head_dim]
        for num_stages in stages
    )


def shared_bytes(kernel: str, head_dim: int, tiling: Tiling) -> int:
    """Shared memory that the tiles of a program take, in 16 bits: two kept, two streamed for each stage."""
    kept, streamed = tiling.block_q, tiling.block_k
    if kernel in ("forward", "decode"):
        return 2 * head_dim * (kept + 2 * streamed * tiling.num_stages)
    kept, streamed = (streamed, kept) if kernel == "dkv" else (kept, streamed)
    return 4 * head_dim * (kept + streamed * tiling.num_stages)


@dataclasses.dataclass(frozen=True)
class Job:
    """Tilings of one kernel at one head dim, at Llama-3.2-1B's heads: causal, or one query and many keys."""

    kernel: str
    head_dim: int
    tilings: tuple[Tiling, ...]

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Query, key, value and the output's cotangent."""
        T, S = (1, 8192) if self.kernel == "decode" else (4096, 4096)
        sizes = ((T, 32), (S, 8), (S, 8), (T, 32))
        return [jax.ShapeDtypeStruct((1, n, heads, self.head_dim), "bfloat16") for n, heads in sizes]

    def run(self, q, k, v, g) -> list:
        """The kernel once for each tiling; the forward ones without and with the log-sum-exp, which differ."""
        mask, results = Full() if self.kernel == "decode" else Causal(), []
        for tiling in self.tilings:
            implementation = implement(self.kernel, tiling, platform="cuda")
            results.append(run_kernel(self.kernel, implementation, mask, q, k, v, g))
            if self.kernel in ("forward", "decode"):
                options = {"implementation": implementation, "return_residual": True}
                results.append(dot_product_attention(q, k, v, mask=mask, **options))
        return results


def run_kernel(kernel: str, implementation, mask, q, k, v, g):
    """What a kernel computes; what else a gradient needs is dropped by the compiler, the forward kernel excepted."""

    def attend(q, k, v):
        return dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    if kernel in ("forward", "decode"):
        return attend(q, k, v)
    return jax.vjp(attend, q, k, v)[1](g)[slice(0, 1) if kernel == "dq" else slice(1, 3)]


def implement(kernel: str, tiling: Tiling, **options) -> Triton:
    """The implementation with this tiling of one kernel."""
    if kernel in ("dq", "dkv"):
        return Triton(**{kernel: tiling}, **options)
    fields = {name: getattr(tiling, name) for name in ("block_q", "block_k", "num_warps", "num_stages")}
    return Triton(**fields, **options)


def compile_facts(device: str, jobs: list[Job], wheels: Path | None = None) -> list[dict]:
    """What the compiler says of every tiling of some jobs, compiled as one program for a compute capability."""
    limit = targets.get(TARGETS[device]).shared_bytes_per_block - 2048
    jobs = [
        dataclasses.replace(
            job, tilings=tuple(x for x in job.tilings if shared_bytes(job.kernel, job.head_dim, x) <= limit)
        )
        for job in jobs
    ]

    def run(*arguments):
        return [job.run(*given) for job, given in zip(jobs, arguments, strict=True)]

    found = resources.kernel_resources(run, *(job.shapes for job in jobs), target=TARGETS[device], wheels=wheels)
    return [fact(device, job, tiling, found) for job in jobs for tiling in job.tilings]


def all_facts(kernels, wheels: Path | None) -> list[dict]:
    """The facts of the whole space, those of some kernels new, those of the others as they were."""
    jobs = [(device, Job(*key, space(*key))) for device in TARGETS for key in SPACE]
    facts = read(FACTS)
    for device, job in track([x for x in jobs if x[1].kernel in kernels], description="Compiling"):
        facts = [x for x in facts if (x["device"], x["kernel"], x["head_dim"]) != (device, job.kernel, job.head_dim)]
        facts += compile_facts(device, [job], wheels)
    order = [(device, job.kernel, job.head_dim) for device, job in jobs]
    return sorted(facts, key=lambda x: order.index((x["device"], x["kernel"], x["head_dim"])))


def shipped(device: str) -> list[Job]:
    """The tilings that the library takes on a compute capability where nothing was measured."""
    return [
        Job(kernel, head_dim, (default_tiling(kernel, head_dim, "bfloat16", devices=(device,)),))
        for head_dim in HEAD_DIMS
        for kernel in KERNELS
    ]


def fact(device: str, job: Job, tiling: Tiling, found) -> dict:
    """One row of the facts, from the resources of the kernel that has this tiling and head dim."""
    name = "attention_" + ("forward" if job.kernel == "decode" else job.kernel)
    suffix = f"_{tiling.block_q}x{tiling.block_k}_{tiling.num_warps}w{tiling.num_stages}s_h{job.head_dim}"
    variants = [x for x in found if x.name.startswith(name) and suffix in x.name]
    kernel_found = max(variants, key=lambda x: (x.spill_store_bytes, x.registers))
    return {
        "device": device,
        "kernel": job.kernel,
        "head_dim": job.head_dim,
        "tiling": [tiling.block_q, tiling.block_k, tiling.num_warps, tiling.num_stages],
        "registers": kernel_found.registers,
        "spilled_bytes": kernel_found.spill_store_bytes + kernel_found.spill_load_bytes,
        "shared_bytes": kernel_found.shared_bytes,
        "wgmma": kernel_found.wgmma,
        "mma": kernel_found.mma,
        "serialized": kernel_found.serialized,
        "blocks_per_core": kernel_found.blocks_per_core,
        "occupancy": round(kernel_found.occupancy, 4),
    }


def survives(fact: dict) -> bool:
    """Nothing spilled, it fits, it uses the tensor cores, on 9.0 by wgmma, which overlaps. (A decoding tile is too
    low for wgmma, whose tiles have 64 rows.)
    """  # fmt: skip
    warp_group = fact["device"] == "9.0" and fact["kernel"] != "decode"
    products = fact["wgmma"] if warp_group else fact["wgmma"] + fact["mma"]
    return bool(products) and not (fact["spilled_bytes"] or fact["serialized"]) and fact["blocks_per_core"] > 0


def rank(fact: dict) -> tuple:
    """The rule without a measurement; the smallest wins.

    First two programs on a core, for one's exponentials overlap the other's products; then the larger block_q block_k
    / (block_q + block_k), the products per loaded number; then three stages, one tile in use, one arriving and one to
    spare; then fewer warps, for a warp with more rows reads each key tile for more of them. A decoding kernel waits
    for memory alone: most keys in flight win.
    """
    block_q, block_k, num_warps, num_stages = fact["tiling"]
    programs = min(fact["blocks_per_core"], 2)
    if fact["kernel"] == "decode":
        return -fact["blocks_per_core"] * block_k * (num_stages - 1), num_warps, num_stages
    intensity = block_q * block_k / (block_q + block_k)
    return -programs, -intensity, -min(num_stages, 3), num_warps, num_stages, -block_q


def pick(facts: list[dict]) -> list[dict]:
    """One row of the table for each device, kernel and head dim, by `rank` among those that survive."""
    rows = []
    for key in dict.fromkeys((x["device"], x["kernel"], x["head_dim"]) for x in facts):
        alive = [x for x in facts if (x["device"], x["kernel"], x["head_dim"]) == key and survives(x)]
        best = min(alive, key=rank)
        rows.append({name: best[name] for name in ("device", "kernel", "head_dim", "tiling")})
    return rows


def measure(facts: list[dict], seconds: float) -> list[dict]:
    """Times the surviving tilings on the GPU here, 16384 queries in all, and returns rows of the table."""
    end = time.monotonic() + seconds
    device = environment.slug(jax.devices()[0].device_kind).split("-")
    device = next(word for word in device if any(map(str.isdigit, word)))
    capability = "9.0" if float(jax.devices()[0].compute_capability) >= 9 else "8.0"
    rows = []
    jobs = [
        (kernel, head_dim, masked, long)
        for head_dim in (64, 128, 256)
        for long in (True, False)
        for masked in (True, False)
        for kernel in ("forward", "dkv", "dq")
    ]
    for kernel, head_dim, masked, long in track(jobs, description=f"Measuring on {device}"):
        alive = [x for x in facts if (x["device"], x["kernel"], x["head_dim"]) == (capability, kernel, head_dim)]
        times = {}
        for candidate in sorted(filter(survives, alive), key=rank):
            if time.monotonic() > end:
                break
            implementation, T = implement(kernel, Tiling(*candidate["tiling"])), 4096 if long else 1024
            mask, shape = Causal() if masked else Full(), (16384 // T, T, head_dim)
            times[tuple(candidate["tiling"])] = milliseconds(kernel, implementation, mask, shape)
        if not times:
            break
        best = min(times, key=times.get)
        rows.append(
            {"device": device, "kernel": kernel, "head_dim": head_dim, "masked": masked, "long": long}
            | {"tiling": list(best), "ms": round(times[best], 4), "of": len(times)}
        )
        print(json.dumps(rows[-1]))
    return rows


def milliseconds(kernel: str, implementation, mask, shape: tuple[int, int, int], repeats: int = 10) -> float:
    """Median time of one kernel with what surrounds it; infinite where its result is wrong. shape: B, T, head dim."""
    B, T, head_dim = shape
    shapes = [(B, T, heads, head_dim) for heads in (16, 4, 4, 16)]
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    run, naive = [jax.jit(functools.partial(run_kernel, kernel, x, mask)) for x in (implementation, "naive")]
    first = [x[:1, :512] for x in arrays]
    for actual, expected in zip(jax.tree.leaves(run(*first)), jax.tree.leaves(naive(*first)), strict=True):
        difference = np.asarray(actual, np.float32) - np.asarray(expected, np.float32)
        if not np.sqrt(np.mean(difference**2)) <= 0.02 * np.sqrt(np.mean(np.asarray(expected, np.float32) ** 2)):
            return float("inf")
    jax.block_until_ready([run(*arrays) for _ in range(2)])
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run(*arrays) for _ in range(5)])
        times.append((time.perf_counter() - start) / 5)
    return statistics.median(times) * 1e3


def same_row(row: dict, other: dict) -> bool:
    """Whether two rows of the table are for the same use."""
    return all(row.get(name) == other.get(name) for name in ("device", "kernel", "head_dim", "masked", "long"))


def read(path: Path) -> list[dict]:
    """Rows of a table or of facts; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def write_table(rows: list[dict]) -> None:
    TABLE.write_text(_lines(rows))


def write_facts(facts: list[dict]) -> None:
    """The facts as JSON, and beside it as a Markdown table in which the picks are bold."""
    FACTS.write_text(_lines(facts))
    picks = {json.dumps(row) for row in pick(facts)}
    columns = ("device", "kernel", "head_dim", "tiling", "registers", "spilled_bytes", "shared_bytes", "wgmma", "mma")
    columns = (*columns, "serialized", "blocks_per_core", "occupancy")
    lines = [
        "# What the compiler says of the Triton kernels",
        "",
        "Causal, bfloat16, Llama-3.2-1B's heads; compiled for an H100 (9.0) and an A100 (8.0) without one, by "
        "`python -m bench tune --facts`. A tiling is block_q, block_k, warps, stages. Bold: shipped, where nothing "
        "was measured.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for x in facts:
        bold = json.dumps({name: x[name] for name in ("device", "kernel", "head_dim", "tiling")}) in picks
        cells = [str(x[name]) for name in columns]
        cells[3] = f"**{cells[3]}**" if bold else cells[3]
        lines.append("| " + " | ".join(cells) + " |")
    FACTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _lines(rows: list[dict]) -> str:
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
