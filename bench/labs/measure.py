"""One program in a process of its own: wall time, peak resident memory, temporaries, bytes by the profiler.

Design fact: a program is named, not passed: "module:function" and a case, so that a fresh process can build it. What
memory costs is the peak of the first call above what the process held with the program compiled and its inputs made.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import child, environment, run

REPEATS = 5
ENOUGH_S = 1.0


def measure(
    function: str,
    cases: list[dict],
    *,
    repeats: int = REPEATS,
    enough_s: float = ENOUGH_S,
    profile: str = "all",
    save: Path | None = None,
) -> Iterator[dict]:
    """Measures the cases one after the other in one fresh process; yields each row as it comes.

    Args:
      function: "module:name" of a function that takes a case's entries and returns (fn, arguments), a jittable
        function and its NumPy arrays.
      cases: keyword arguments of the function, JSON-ready.
      repeats: at most so many timed calls after the first.
      enough_s: no further timed call once all calls took so many seconds; there is at least one.
      profile: of which cases to count the bytes that one call moves: "all" or "last".
      save: a folder for the leaves of each case's result, "0.npz" and so on.

    Raises: RuntimeError where the process fails, with the error that ended it.
    """
    request = {"function": function, "cases": cases, "repeats": repeats, "enough_s": enough_s, "profile": profile}
    request["save"] = str(save) if save else None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.labs.measure"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=run.ROOT,
            env=run.child_environment("auto", environment.cores()),
        )
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if code:
            errors.seek(0)
            lines = [
                line for line in errors.read().splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)
            ]
            raise RuntimeError(f"{function} with {cases}: {(lines or [f'exit code {code}'])[-1]}")


def measure_outputs(function: str, cases: list[dict], **options) -> Iterator[tuple[dict, list[np.ndarray]]]:
    """`measure`, with the leaves of each case's result beside its row."""
    with tempfile.TemporaryDirectory() as folder:
        for index, row in enumerate(measure(function, cases, save=Path(folder), **options)):
            with np.load(f"{folder}/{index}.npz") as saved:
                leaves = [saved[name] for name in saved.files]
            yield row, leaves


def measure_here(
    function: str, case: dict, repeats: int, profile: bool, save: str | None = None, enough_s: float = ENOUGH_S
) -> dict:
    """Measures one case in this process; what each process that `measure` starts does.

    Returns: the case with `times_s`, `time_s` (median), `first_s`, `rss_bytes`, `temporaries_bytes`, `output_bytes`,
      and with `profile` `requested_bytes`, `compulsory_bytes`, `dram_bytes` [low, high] (cold, model), `flops` and
      `kernels` (`scope`, `calls`, `bytes`, `flops`).
    """
    import jax

    module, name = function.split(":")
    fn, arrays = getattr(importlib.import_module(module), name)(**case)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    compiled = jax.jit(fn).lower(*structs).compile()
    inputs = jax.block_until_ready(jax.device_put(arrays))
    give_back_memory()
    base = child.resident_bytes("VmRSS")
    child.reset_peak_rss()
    start = time.perf_counter()
    outputs = jax.block_until_ready(compiled(*inputs))
    times = [time.perf_counter() - start]
    peak = child.resident_bytes("VmHWM")
    if save:
        np.savez(save, *map(np.asarray, jax.tree.leaves(outputs)))
    outputs = None
    while (len(times) <= repeats and sum(times) < enough_s) or len(times) == 1:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    row = dict(case) | {
        "first_s": times[0],
        "times_s": times[1:],
        "time_s": statistics.median(times[1:]),
        "rss_bytes": max(0, peak - base),
        "temporaries_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }
    return row | count(fn, structs) if profile else row


def count(fn, arguments) -> dict:
    """The bytes and operations of one call by `jaxattn.profiler`, JSON-ready."""
    from jaxattn import profiler

    report = profiler.profile(fn, *arguments)
    dram = report.dram.cold.total
    return {
        "requested_bytes": report.requested.total,
        "compulsory_bytes": report.compulsory.total,
        "dram_bytes": sorted((dram.low, dram.high)),
        "flops": report.flops,
        "unknown": list(report.unknown),
        "kernels": [
            {"scope": row.scope, "calls": row.calls, "bytes": row.bytes, "flops": row.flops} for row in report.rows
        ],
    }


def give_back_memory() -> None:
    """Return freed memory to the system, so that a call that needs it again is seen to need it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    """Serve one request from stdin: a line of JSON per case, to what stdout was; prints go to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    for index, case in enumerate(request["cases"]):
        save = request["save"] and f"{request['save']}/{index}.npz"
        profile = request["profile"] == "all" or index == len(request["cases"]) - 1
        row = measure_here(request["function"], case, request["repeats"], profile, save, request["enough_s"])
        replies.write(json.dumps(row) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
