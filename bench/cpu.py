"""`python -m bench cpu`: blockwise against torch's flash attention on a CPU, in pairs.

Design fact: a pair is one call of each, one right after the other, and what is reported is the median of the pairs'
ratios: a machine that slows down for a while slows both halves of a pair. JAX's own large matrix product is timed
beside them, for it bounds what an attention made of matrix products can reach.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench import cases, environment, gpu, measure, pairs, results, run
from jaxattn import Blockwise, Causal, Full, Window, dot_product_attention
from jaxattn.impl.blockwise import default_blocks

PAIRS = 5
PRODUCT = 2048  # rows and columns of the matrix product


@dataclasses.dataclass(frozen=True)
class Part:
    """One question: its cases, dtype and direction. torch runs beside causal and full, which its flash takes."""

    text: str
    cases: tuple[cases.Case, ...]
    dtype: str = "float32"
    direction: str = "forward"


def _case(name: str, heads: int, kv_heads: int, head_dim: int, lengths, masks, **others) -> cases.Case:
    implementations = (pairs.OURS, pairs.TORCH) if set(masks) <= {"causal", "full"} else (pairs.OURS,)
    return cases.Case(
        name=name,
        title=f"N={heads} K={kv_heads} H={head_dim}",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        lengths=lengths,
        quick_lengths=lengths[:1],
        implementations=implementations,
        masks=masks,
        **others,
    )


LONG = (4096, 8192, 16384)
BOTH = ("causal", "full")
PARTS = {
    "forward": Part(
        "float32, forward",
        (
            _case("mha", 8, 8, 64, LONG, BOTH),
            _case("llama", 32, 8, 64, LONG, BOTH),
            _case("wide", 16, 4, 128, LONG, BOTH),
        ),
    ),
    "bfloat16": Part("bfloat16, forward", (_case("llama", 32, 8, 64, (2048, 4096), BOTH),), dtype="bfloat16"),
    "training": Part(
        "float32, forward and backward",
        (_case("mha", 8, 8, 64, (2048, 4096), BOTH), _case("llama", 32, 8, 64, (2048, 4096), BOTH)),
        direction="both",
    ),
    "window": Part(
        "float32, a window of 256 beside causal",
        (
            _case("window", 8, 8, 64, (16384, 32768, 65536), ("window(255, 0)",)),
            _case("causal", 8, 8, 64, (16384,), ("causal",)),
        ),
    ),
    "decode": Part(
        "float32, decoding against a cache",
        (
            _case("decode-1", 32, 8, 64, (1024, 8192, 65536), ("full",), queries=1),
            _case("decode-8", 32, 8, 64, (1024, 8192, 65536), ("full",), queries=8),
        ),
    ),
}


def product_flops_per_s(threads: int) -> float:
    """Operations a second of JAX's product of two float32 matrices of `PRODUCT` rows, in a process like a row's own."""
    code = "from bench import cpu; print(cpu.time_product())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=run.ROOT,
        env=run.child_environment("cpu", threads or environment.cores()),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return 2 * PRODUCT**3 / float(found.stdout)


def time_product() -> float:
    """Seconds of the product: the median of several, after one that warms up."""
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    a = jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    multiply(a).block_until_ready()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# Where the rule of block sizes is tried: (T, S, N, K, H, mask, dtype, with gradients).
SWEEP = (
    (4096, 4096, 8, 8, 64, Causal(), "float32", False),
    (4096, 4096, 8, 8, 64, Full(), "float32", False),
    (4096, 4096, 8, 2, 64, Causal(), "float32", False),
    (4096, 4096, 4, 1, 128, Causal(), "float32", False),
    (4096, 4096, 4, 4, 64, Causal(), "float32", True),
    (2048, 2048, 8, 2, 64, Causal(), "float32", True),
    (2048, 2048, 8, 2, 64, Causal(), "bfloat16", False),
    (16384, 16384, 2, 2, 64, Window(255, 0), "float32", False),
    (1, 16384, 32, 8, 64, Full(), "float32", False),
)
BLOCKS = tuple((rows, block_k) for rows in (128, 256, 512, 1024, 2048) for block_k in (128, 256, 512, 1024, 8192))


def sweep(rounds: int) -> None:
    """Prints the times of all `BLOCKS` (rows over the heads of a group, keys) and of the rule's choice, interleaved."""
    for T, S, N, K, H, mask, dtype, gradients in SWEEP:
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.standard_normal((1, *shape, H)), dtype) for shape in ((T, N), (S, K), (S, K))]
        rule = default_blocks(mask, T, S, N // K)
        chosen = {rule} | {(min(T, max(rows * K // N, 1)), min(S, keys)) for rows, keys in BLOCKS}
        calls = {}
        for blocks in sorted(chosen):
            attend = functools.partial(dot_product_attention, mask=mask, implementation=Blockwise(*blocks))
            call = jax.jit(functools.partial(_with_gradients, attend) if gradients else attend)
            calls[blocks] = functools.partial(call.lower(*arrays).compile(), *arrays)
            jax.block_until_ready(calls[blocks]())
        seconds: dict[tuple[int, int], list[float]] = {blocks: [] for blocks in calls}
        for _ in range(rounds):
            for blocks, call in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(call())
                seconds[blocks].append(time.perf_counter() - start)
        medians = {blocks: statistics.median(times) for blocks, times in seconds.items()}
        best = min(medians, key=medians.get)
        what = "forward + backward" if gradients else "forward"
        print(f"T={T} S={S} N={N} K={K} H={H} {mask}, {dtype}, {what}: the rule's {medians[rule] / medians[best]:.2f}x")
        for blocks, median in sorted(medians.items(), key=lambda item: item[1]):
            note = "  the rule's" if blocks == rule else ""
            print(f"    {blocks[0]:>5} x {blocks[1]:<6}{median * 1e3:>10.1f} ms{median / medians[best]:>7.2f}x{note}")


def _with_gradients(attend, *arrays):
    out, pullback = jax.vjp(attend, *arrays)
    return pullback(out)


def chosen_cases(part: Part, lengths: list[int]) -> list[cases.Case]:
    """The part's cases at those of their lengths that are asked for; all of them where none are."""
    chosen = []
    for case in part.cases:
        found = tuple(n for n in case.lengths if not lengths or n in lengths)
        if found:
            chosen.append(dataclasses.replace(case, lengths=found))
    return chosen


def main(argv: list[str]) -> int:
    """Time blockwise and torch's flash attention in pairs on this CPU, and print the ratios."""
    parser = argparse.ArgumentParser(prog="python -m bench cpu", description=main.__doc__)
    parser.add_argument("--part", action="append", default=[], choices=list(PARTS), help="may be repeated")
    parser.add_argument("--seq", type=int, action="append", default=[], metavar="KEYS", help="only these lengths")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--minutes", type=float, default=45.0, help="what does not fit is skipped and listed")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with a run that was stopped")
    parser.add_argument("--publish", action="store_true", help="copy the results to bench/results/cpu/pairs")
    parser.add_argument("--sweep", action="store_true", help="instead, time tile sizes beside the rule that picks them")
    options = parser.parse_args(argv)
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs}: must be at least 1")
    if options.sweep:
        sweep(options.pairs)
        return 0
    try:
        data = results.load(options.resume) if options.resume else None
    except ValueError as error:
        parser.error(str(error))
    folder, command = options.resume or options.out, shlex.join(["python", "-m", "bench", "cpu", *argv])
    end = time.monotonic() + 60 * options.minutes
    names = [name for name in options.part or PARTS if chosen_cases(PARTS[name], options.seq)]
    if not names:
        parser.error(f"--seq {options.seq}: no part that is asked for has such a length")
    rates = [data["product_flops_per_s"]] if data else []
    whole: dict = {}  # what is true of all parts, which share one file
    for name in names:
        part = PARTS[name]
        print(f"{name}: {part.text}", flush=True)
        settings = run.Settings(
            device="cpu",
            total_s=end - time.monotonic(),
            dtype=part.dtype,
            direction=part.direction,
            repeats=options.pairs,
            threads=options.threads,
            length_s=float("inf"),
        )
        rates.append(product_flops_per_s(options.threads))
        try:
            with run.Runner(settings, folder, command, data) as runner:
                whole = whole or {key: runner.results[key] for key in ("date", "resumed") if key in runner.results}
                runner.results.pop("resumed", None)
                runner.results |= whole | {"product_flops_per_s": statistics.median(rates)}
                for setting in ("dtype", "direction"):
                    runner.results["settings"][setting] = ", ".join(
                        dict.fromkeys(getattr(PARTS[each], setting) for each in names)
                    )
                runner.save()
                folder, data = runner.folder, runner.results
                runner.run(chosen_cases(part, options.seq))
        except RuntimeError as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print(f"Stopped. To go on: {command} --resume {shlex.quote(str(folder))}")
            return 130
    print(pairs.table(data), *pairs.findings(data), sep="\n")
    measure.finish(data, folder, figures=False, traffic=False)
    try:
        print(pairs.draw(data, folder / "pairs.png"))
    except ImportError as error:
        print(f"No figure of the pairs: {error}")
    if options.publish:
        print(f"Published: {gpu.publish_part(folder, run.ROOT / 'bench/results/cpu/pairs')}")
    return int(any(row["status"] == "wrong" for row in data["rows"]))
