"""`python -m bench tune`: tilings for the Triton kernels, cut by what the compiler says, then measured on a GPU.

Design fact: what a tiling costs in registers and shared memory is known without a GPU, by compiling for one. Most of
the space falls away there, so a GPU measures only what can win; without one a rule picks from the same facts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from bench import environment
from jaxattn import Causal, Full, dot_product_attention
from jaxattn.impl import triton
from jaxattn.impl.triton import Tiling, Triton, default_tiling
from jaxattn.profiler import resources, targets

FACTS = Path(__file__).parent / "results" / "triton_compile_facts.json"
TABLE = Path(__file__).parent.parent / "jaxattn" / "impl" / "triton_table.json"
TARGETS = {"9.0": "h100", "8.0": "a100", "8.9": "l4"}
KERNELS = ("forward", "decode", "dq", "dkv")
_KEY = ("device", "kernel", "head_dim", "dtype")
HEAD_DIMS = (64, 128, 256)
# float16 takes bfloat16's rows, for it is as large, and as fast on the tensor cores; float32's, without tensor cores,
# are those of the GPUs with the least shared memory.
TABLES = (("9.0", "bfloat16"), ("8.0", "bfloat16"), ("8.9", "bfloat16"), ("8.9", "float32"))
SPACE_32 = {  # float32, without tensor cores: what a thread multiplies lies in registers
    ("forward", 64): [("32/32/4", (1, 2)), ("64/32/8", (2,))],
    ("forward", 128): [("32/32/8", (1,)), ("16/32/4", (1,))],
    ("forward", 256): [("16/16/4", (1,)), ("16/16/8", (1,))],
    ("decode", 64): [("16/32/4", (1, 2))],
    ("decode", 128): [("16/32/4", (1,)), ("16/16/4", (1,))],
    ("decode", 256): [("16/16/4", (1,)), ("16/16/8", (1,))],
    ("dq", 64): [("32/32/4", (1,)), ("32/32/8", (1,))],
    ("dq", 128): [("32/16/4", (1,)), ("16/16/4", (1,))],
    ("dq", 256): [("16/16/4", (1,)), ("16/16/8", (1,))],
    ("dkv", 64): [("32/32/4", (1,)), ("32/32/8", (1,))],
    ("dkv", 128): [("16/32/8", (1,)), ("16/16/4", (1,))],
    ("dkv", 256): [("16/16/4", (1,)), ("16/16/8", (1,))],
}
SPACE = {  # 16 bits, (kernel, head dim): block_q/block_k/warps and numbers of stages
    ("forward", 64): [
        ("128/64/4", (2, 3, 4)),
        ("128/64/8", (2, 3)),
        ("128/128/8", (2, 3)),
        ("64/64/4", (3,)),
        ("64/128/4", (3,)),
    ],
    ("forward", 128): [("128/64/8", (2, 3)), ("128/128/8", (2,)), ("64/64/4", (2, 3)), ("64/128/4", (2,))],
    ("forward", 256): [
        ("128/32/8", (2, 3)),
        ("128/64/8", (2,)),
        ("64/32/4", (2, 3)),
        ("64/64/4", (2,)),
        ("64/32/8", (2,)),
        ("32/32/4", (2,)),
    ],
    ("decode", 64): [("16/64/4", (3, 4)), ("16/128/4", (2, 3, 4))],
    ("decode", 128): [("16/64/4", (2, 3, 4)), ("16/128/4", (2,))],
    ("decode", 256): [("16/32/4", (2, 3)), ("16/64/4", (2,))],
    ("dq", 64): [("128/64/8", (2, 3)), ("128/128/8", (2,)), ("64/64/4", (2, 3)), ("64/128/4", (2,))],
    ("dq", 128): [("128/64/8", (2,)), ("128/32/8", (2, 3)), ("64/64/4", (2,)), ("64/32/4", (2, 3))],
    ("dq", 256): [("128/32/8", (2,)), ("64/64/8", (2,)), ("64/32/4", (2,)), ("64/32/8", (1, 2)), ("32/32/4", (2,))],
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
    """Tune on the GPU that is here, or with --facts for compute capabilities 9.0, 8.0 and 8.9 without one."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=main.__doc__)
    parser.add_argument("--facts", action="store_true", help="compile every tiling, write the facts and pick by rule")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="with --facts: only this; may be repeated")
    parser.add_argument("--device", choices=TARGETS, action="append", help="with --facts: only this; may be repeated")
    parser.add_argument("--pick", action="store_true", help="pick again by rule from the facts that are there")
    parser.add_argument("--wheels", type=Path, help="folder of the compile wheels, where not the usual one")
    parser.add_argument("--minutes", type=float, default=0.8, help="time to measure in; what matters most comes first")
    parser.add_argument("--orders", action="store_true", help="time both orders of tiles, PARTIAL or FULL ones first")
    parser.add_argument("--write", action="store_true", help="write what was measured into the table that ships")
    arguments = parser.parse_args(argv)
    if arguments.facts or arguments.pick:
        facts = read(FACTS)
        if not arguments.pick:
            facts = all_facts(arguments.kernel or KERNELS, arguments.device or tuple(TARGETS), arguments.wheels)
        write_facts(facts)
        write_table([*pick(facts), *(row for row in read(TABLE) if row["device"] not in TARGETS)])
        print(f"Facts: {FACTS}\nTable: {TABLE}")
        return 0
    if jax.default_backend() != "gpu":
        print("No GPU to measure on. --facts compiles for GPUs that are not here.", file=sys.stderr)
        return 2
    if arguments.orders:
        here = triton.device_names()
        picked = [
            (kernel, head_dim, default_tiling(kernel, head_dim, "bfloat16", True, 4096, here))
            for head_dim in (64, 128)
            for kernel in ("forward", "dq", "dkv")
        ]
        for kernel, head_dim, tiling in picked:
            orders([(kernel, tiling)], (4, 4096, head_dim))
        return 0
    rows = measure(read(FACTS), arguments.minutes * 60)
    if arguments.write:
        write_table([*(row for row in read(TABLE) if not any(same_row(row, new) for new in rows)), *rows])
        print(f"Table: {TABLE}")
    return 0


def space(kernel: str, head_dim: int, dtype: str = "bfloat16") -> tuple[Tiling, ...]:
    """The tilings worth compiling: accumulators that registers may hold, at least 64 rows for wgmma."""
    return tuple(
        Tiling(*map(int, blocks.split("/")), num_stages)
        for blocks, stages in (SPACE if dtype == "bfloat16" else SPACE_32)[kernel, head_dim]
        for num_stages in stages
    )


def shared_bytes(job: Job, tiling: Tiling) -> int:
    """Shared memory that the tiles of a program take: two kept, two streamed for each stage."""
    kept, streamed, row = tiling.block_q, tiling.block_k, jnp.dtype(job.dtype).itemsize * job.head_dim
    if job.kernel in ("forward", "decode"):
        return row * (kept + 2 * streamed * tiling.num_stages)
    kept, streamed = (streamed, kept) if job.kernel == "dkv" else (kept, streamed)
    return 2 * row * (kept + streamed * tiling.num_stages)


@dataclasses.dataclass(frozen=True)
class Job:
    """Tilings of one kernel at one head dim, at Llama-3.2-1B's heads: causal, or one query and many keys."""

    kernel: str
    head_dim: int
    tilings: tuple[Tiling, ...]
    dtype: str = "bfloat16"

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Query, key, value and the output's cotangent."""
        T, S = (1, 8192) if self.kernel == "decode" else (4096, 4096)
        sizes = ((T, 32), (S, 8), (S, 8), (T, 32))
        return [jax.ShapeDtypeStruct((1, n, heads, self.head_dim), self.dtype) for n, heads in sizes]

    def run(self, q, k, v, g) -> list:
        """The kernel once for each tiling; the forward ones without and with the log-sum-exp, which differ."""
        mask, results = Full() if self.kernel == "decode" else Causal(), []
        for tiling in self.tilings:
            implementation = implement(self.kernel, tiling, platform="cuda")
            results.append(run_kernel(self.kernel, implementation, mask, q, k, v, g))
            if self.kernel == "forward":
                results.append(run_kernel("saving", implementation, mask, q, k, v, g))
        return results


def run_kernel(kernel: str, implementation, mask, q, k, v, g):
    """What a kernel computes; "saving": the forward kernel that also writes the log-sum-exp, for a gradient.

    What else a gradient needs is dropped by the compiler, the forward kernel excepted.
    """

    def attend(q, k, v):
        return dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    if kernel in ("forward", "decode"):
        return attend(q, k, v)
    out, pullback = jax.vjp(attend, q, k, v)
    return out if kernel == "saving" else pullback(g)[slice(0, 1) if kernel == "dq" else slice(1, 3)]


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
        dataclasses.replace(job, tilings=tuple(x for x in job.tilings if shared_bytes(job, x) <= limit)) for job in jobs
    ]

    def run(*arguments):
        return [job.run(*given) for job, given in zip(jobs, arguments, strict=True)]

    found = resources.kernel_resources(run, *(job.shapes for job in jobs), target=TARGETS[device], wheels=wheels)
    return [fact(device, job, tiling, found) for job in jobs for tiling in job.tilings]


def all_facts(kernels, devices, wheels: Path | None) -> list[dict]:
    """The facts of the whole space, those of some kernels and devices new, those of the others as they were."""
    jobs = [(device, *key, dtype) for device, dtype in TABLES for key in SPACE]
    facts = {key: [x for x in read(FACTS) if key_of(x) == key] for key in jobs}
    chosen = [key for key in jobs if key[0] in devices and key[1] in kernels]
    for key in track(chosen, description="Compiling"):
        device, kernel, head_dim, dtype = key
        facts[key] = compile_facts(device, [Job(kernel, head_dim, space(kernel, head_dim, dtype), dtype)], wheels)
    return [x for key in jobs for x in facts[key]]


def key_of(row: dict) -> tuple[str, str, int, str]:
    """What a row of the facts or of the table is for: device, kernel, head dim, dtype."""
    return tuple(row[name] for name in _KEY)


def shipped(device: str, dtype: str) -> list[Job]:
    """The tilings that the library takes on a compute capability where nothing was measured."""
    return [
        Job(kernel, head_dim, (default_tiling(kernel, head_dim, dtype, devices=(device,)),), dtype)
        for head_dim in HEAD_DIMS
        for kernel in KERNELS
    ]


def fact(device: str, job: Job, tiling: Tiling, found) -> dict:
    """One row of the facts, the worst of the kernels that have this tiling and head dim."""
    name = "attention_" + ("forward" if job.kernel == "decode" else job.kernel)
    suffix = f"_{tiling.block_q}x{tiling.block_k}_{tiling.num_warps}w{tiling.num_stages}s_h{job.head_dim}"
    variants = [x for x in found if x.name.startswith(name) and suffix in x.name]
    return {
        "device": device,
        "kernel": job.kernel,
        "head_dim": job.head_dim,
        "dtype": job.dtype,
        "tiling": [tiling.block_q, tiling.block_k, tiling.num_warps, tiling.num_stages],
        "registers": max(x.registers for x in variants),
        "spilled_bytes": max(x.spill_store_bytes + x.spill_load_bytes for x in variants),
        "shared_bytes": max(x.shared_bytes for x in variants),
        "wgmma": min(x.wgmma for x in variants),
        "mma": min(x.mma for x in variants),
        "serialized": any(x.serialized for x in variants),
        "blocks_per_core": min(x.blocks_per_core for x in variants),
        "occupancy": round(min(x.occupancy for x in variants), 4),
    }


def survives(fact: dict) -> bool:
    """Nothing spilled, it fits, it uses the tensor cores, on 9.0 by wgmma, which overlaps.

    A decoding tile is too low for wgmma, whose tiles have 64 rows; full float32 has no tensor cores.
    """
    warp_group = fact["device"] == "9.0" and fact["kernel"] != "decode"
    products = fact["wgmma"] if warp_group else fact["wgmma"] + fact["mma"]
    tensor_cores = products or fact["dtype"] == "float32"
    return bool(tensor_cores) and not (fact["spilled_bytes"] or fact["serialized"]) and fact["blocks_per_core"] > 0


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
    """One row of the table for each device, kernel, head dim and dtype, by `rank` among those that survive."""
    rows = []
    for key in dict.fromkeys(map(key_of, facts)):
        best = min((x for x in facts if key_of(x) == key and survives(x)), key=rank)
        rows.append({name: best[name] for name in (*_KEY, "tiling")})
    return rows


def measure(facts: list[dict], seconds: float) -> list[dict]:
    """Times the surviving tilings on the GPU here, 16384 queries in all, and returns rows of the table.

    Tilings whose result is wrong are left out; where that leaves none, it is printed and there is no row.
    """
    end, dtype = time.monotonic() + seconds, "bfloat16"
    device = environment.slug(jax.devices()[0].device_kind).split("-")
    device = next(word for word in device if any(map(str.isdigit, word)))
    capability = triton.tuned_capability(float(jax.devices()[0].compute_capability))
    rows = []
    jobs = [
        (kernel, head_dim, masked, long)
        for head_dims in ((64, 128), (256,))
        for long in (True, False)
        for masked in (True, False)
        for head_dim in head_dims
        for kernel in ("forward", "dkv", "dq")
    ]
    for kernel, head_dim, masked, long in track(jobs, description=f"Measuring on {device}"):
        alive = [x for x in facts if key_of(x) == (capability, kernel, head_dim, dtype) and survives(x)]
        tilings = [Tiling(*x["tiling"]) for x in sorted(alive, key=rank)]
        T = 4096 if long else 1024
        times = measure_tilings(kernel, tilings, Causal() if masked else Full(), (16384 // T, T, head_dim), end)
        if not times:
            break
        right = {tiling: time for tiling, time in times.items() if math.isfinite(time)}
        if not right:
            where = f"{kernel}, head dim {head_dim}, {'causal' if masked else 'full'}, {T} queries"
            print(f"{where}: wrong results with all of {len(times)} tilings that were run; no row.", file=sys.stderr)
            continue
        best = min(right, key=right.get)
        rows.append(
            {"device": device, "kernel": kernel, "head_dim": head_dim, "dtype": dtype, "masked": masked, "long": long}
            | {"tiling": list(dataclasses.astuple(best)), "ms": round(right[best], 4), "of": len(right)}
        )
        print(json.dumps(rows[-1]))
    return rows


def measure_tilings(kernel: str, tilings: list[Tiling], mask, shape, end: float, **options) -> dict[Tiling, float]:
    """Median milliseconds of one kernel, with what surrounds it, for each tiling until time is up.

    Infinite where the result is wrong. Programs are compiled beside each other, for that takes most of the time.

    Args:
      shape: B, T, head dim; 16 query heads, 4 of keys and values.
      end: what `time.monotonic` says when no other tiling is begun.
      options: further ones of `Triton`.
    """
    B, T, head_dim = shape
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(key, (B, T, heads, head_dim), jnp.bfloat16)
        for key, heads in zip(keys, (16, 4, 4, 16), strict=True)
    ]
    if time.monotonic() > end:
        return {}
    expected = jax.jit(functools.partial(run_kernel, kernel, "naive", mask))(*(x[:1] for x in arrays))
    implementations = [implement(kernel, tiling, **options) for tiling in tilings]
    lowered = [jax.jit(functools.partial(run_kernel, kernel, x, mask)).lower(*arrays) for x in implementations]
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda x: x.compile(), lowered))
    times = {}
    for tiling, run in zip(tilings, programs, strict=True):
        if time.monotonic() > end and times:
            break
        times[tiling] = milliseconds(run, arrays) if agrees(run(*arrays), expected) else float("inf")
    return times


def orders(picked: list[tuple[str, Tiling]], shape, **options) -> list[dict]:
    """Times kernels, causal, that visit PARTIAL tiles first, as ours do, and that visit FULL ones first."""
    rows, partial_first = [], triton._Tile.in_order
    for kernel, tiling in picked:
        row = {"kernel": kernel, "head_dim": shape[2], "tiling": list(dataclasses.astuple(tiling))}
        for name, order in (
            ("partial_first_ms", partial_first),
            ("full_first_ms", lambda tile, visits: partial_first(tile, visits)[::-1]),
        ):
            with mock.patch.object(triton._Tile, "in_order", order):
                jax.clear_caches()  # the trace of a kernel is kept by its tiling alone
                times = measure_tilings(kernel, [tiling], Causal(), shape, time.monotonic() + 600, **options)
            row[name] = round(times[tiling], 4)
        print(json.dumps(row))
        rows.append(row)
    jax.clear_caches()
    return rows


def agrees(actual, expected) -> bool:
    """Whether the first batch element is as expected, to 2% of its root mean square."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x[:1], np.float32), np.asarray(y, np.float32)
        if not np.sqrt(np.mean((x - y) ** 2)) <= 0.02 * np.sqrt(np.mean(y**2)):
            return False
    return True


def milliseconds(run, arrays, repeats: int = 10) -> float:
    """Median time of one call of a compiled program."""
    jax.block_until_ready([run(*arrays) for _ in range(2)])
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run(*arrays) for _ in range(5)])
        times.append((time.perf_counter() - start) / 5)
    return statistics.median(times) * 1e3


def same_row(row: dict, other: dict) -> bool:
    """Whether two rows of the table are for the same use."""
    return all(row.get(name) == other.get(name) for name in (*_KEY, "masked", "long"))


def read(path: Path) -> list[dict]:
    """Rows of a table or of facts; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def write_table(rows: list[dict]) -> None:
    TABLE.write_text(_lines(rows))


def write_facts(facts: list[dict]) -> None:
    """The facts as JSON, and beside it as a Markdown table in which the picks are bold."""
    FACTS.write_text(_lines(facts))
    picks = {json.dumps(row) for row in pick(facts)}
    columns = (*_KEY, "tiling", "registers", "spilled_bytes", "shared_bytes", "wgmma", "mma", "serialized")
    columns = (*columns, "blocks_per_core", "occupancy")
    lines = [
        "# What the compiler says of the Triton kernels",
        "",
        "Causal, Llama-3.2-1B's heads; compiled for an H100 (9.0), an A100 (8.0) and an L4 (8.9) without one, by "
        "`python -m bench tune --facts`. A tiling is block_q, block_k, warps, stages. Of the forward kernel's two, "
        "without and with the log-sum-exp, the worse figure. Bold: shipped, where nothing was measured. Tilings whose "
        "tiles alone, by an estimate, take more shared memory than a block has, less 2 KiB, were cut before compiling "
        "and have no row. On 9.0 and 8.0 float32 takes 8.9's rows.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for x in facts:
        cells = [str(x[name]) for name in columns]
        if json.dumps({name: x[name] for name in (*_KEY, "tiling")}) in picks:
            cells[len(_KEY)] = f"**{cells[len(_KEY)]}**"
        lines.append("| " + " | ".join(cells) + " |")
    FACTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _lines(rows: list[dict]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n"
