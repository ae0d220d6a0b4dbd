"""`python -m bench counters`: hardware counters beside the profiler's numbers, on an NVIDIA GPU under `ncu`.

Design fact: the profiler's numbers and the counters never mix. Each case runs twice in a child under `ncu`, once
with every cache flushed before each kernel and once with the caches as they are; kernels are joined by name.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import commands, environment
from bench import results as result_files

ROOT = Path(__file__).parent.parent
SECTOR_BYTES = 32
METRICS = {
    "dram__bytes_read.sum": "dram_read",
    "dram__bytes_write.sum": "dram_written",
    "lts__t_sectors_op_read.sum": "l2_read_sectors",
    "lts__t_sectors_op_write.sum": "l2_write_sectors",
    "gpu__time_duration.sum": "time_ns",
}
CASES = ("stream", "naive", "triton", "blockwise")
DEFAULT_CASES = CASES[:3]  # blockwise launches hundreds of kernels, each replayed by ncu
READ_TOLERANCE, WRITE_TOLERANCE = 0.05, 0.10
STREAMS = 4  # a kernel streams if it asks for this many times the cache
FLAGS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch as `ncu` counted it; bytes, sectors of 32 bytes, nanoseconds."""

    kernel: str
    dram_read: float
    dram_written: float
    l2_read_sectors: float
    l2_write_sectors: float
    time_ns: float


@dataclasses.dataclass(frozen=True)
class Joined:
    """One row of the profiler's report beside the launches of its kernel, all summed over the call.

    `dram_read_cold` comes of the run with flushed caches, the rest of the run without.
    """

    kernel: str
    calls: int | None
    launches: int
    requested_read: int
    requested_written: int
    dram_read_cold: float
    dram_read: float
    dram_written: float
    l2_written: float
    time_us: float


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison of a modelled with a measured number."""

    what: str
    model: str
    measured: str
    holds: bool


def missing() -> list[str]:
    """What is not here that counting needs: sentences, none if all is here."""
    found = []
    if environment.nvidia_gpu() is None:
        found.append("no NVIDIA GPU is visible")
    if shutil.which("ncu") is None:
        found.append("ncu (NVIDIA Nsight Compute) is not on the PATH")
    return found


def parse(text: str) -> list[Launch]:
    """Reads what `ncu --csv --page raw --print-units base` wrote.

    Raises:
        ValueError: if there is no table in it, with the tool's own error if it gave one, or if a metric is
            missing.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = [line for line in lines if "ERR" in line or "==ERROR==" in line]
        raise ValueError(said[0] if said else "no table in ncu's output: no kernel was profiled")
    header, units, *rows = csv.reader(lines[start:])
    absent = [name for name in METRICS if name not in header]
    if absent:
        raise ValueError(f"ncu's output has no {', '.join(absent)}")
    launches = []
    for row in rows:
        if len(row) != len(header):
            continue  # ncu's own remarks after the table
        cells = dict(zip(header, row, strict=True))
        values = {}
        for metric, field in METRICS.items():
            unit = units[header.index(metric)]
            scale = {"usecond": 1e3, "us": 1e3, "msecond": 1e6, "ms": 1e6, "second": 1e9, "s": 1e9}.get(unit, 1)
            scale = {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}.get(unit, scale)
            values[field] = float(cells[metric].replace(",", "")) * scale
        launches.append(Launch(kernel=cells["Kernel Name"].split("(")[0], **values))
    return launches


def join(rows: list[dict], cold: list[Launch], warm: list[Launch]) -> tuple[list[Joined], list[str]]:
    """Joins the report's rows to launches by name (XLA's with `.` and `-` as `_`).

    Returns:
        The rows that were launched, and remarks on launches without a row and rows launched another number of
        times than the report says.
    """
    joined, remarks, used = [], [], set()
    for row in rows:
        name = row["name"].replace(".", "_").replace("-", "_")
        own = [launch for launch in warm if launch.kernel == name]
        own_cold = [launch for launch in cold if launch.kernel == name]
        used.add(name)
        if not own:
            if row["opcode"] not in ("copy", "copy-start"):
                remarks.append(f"{name}: in the report, never launched")
            continue
        if row["calls"] != len(own):
            remarks.append(f"{name}: {row['calls']} calls in the report, {len(own)} launches")
        joined.append(
            Joined(
                kernel=name,
                calls=row["calls"],
                launches=len(own),
                requested_read=row["read"],
                requested_written=row["written"],
                dram_read_cold=sum(launch.dram_read for launch in own_cold),
                dram_read=sum(launch.dram_read for launch in own),
                dram_written=sum(launch.dram_written for launch in own),
                l2_written=SECTOR_BYTES * sum(launch.l2_write_sectors for launch in own),
                time_us=sum(launch.time_ns for launch in own) / 1e3,
            )
        )
    others = sorted({launch.kernel for launch in warm} - used)
    return joined, remarks + [f"{name}: launched, in no row of the report" for name in others]


def checks(joined: list[Joined], warm: list[Launch], model: dict, cache_bytes: int) -> list[Check]:
    """The three comparisons: cold reads and L2 writes of streaming kernels, and the whole warm program.

    Args:
        joined: from `join`.
        warm: all launches of the run without flushing.
        model: the report's `dram.warm` as a dict of read and written, each low and high.
        cache_bytes: the device's last cache.
    """
    found = []
    for row in joined:
        per_call = row.requested_read / row.launches
        if per_call >= STREAMS * cache_bytes:
            ratio = row.dram_read_cold / row.requested_read
            holds = abs(ratio - 1) <= READ_TOLERANCE
            what = f"{row.kernel}: DRAM reads from a cold cache against requested reads"
            found.append(Check(what, _bytes(row.requested_read), f"{_bytes(row.dram_read_cold)} ({ratio:.3f}x)", holds))
        if row.requested_written / row.launches >= STREAMS * cache_bytes:
            ratio = row.l2_written / row.requested_written
            holds = abs(ratio - 1) <= WRITE_TOLERANCE
            what = f"{row.kernel}: sectors written in L2 against requested writes"
            found.append(Check(what, _bytes(row.requested_written), f"{_bytes(row.l2_written)} ({ratio:.3f}x)", holds))
    low = model["read"]["low"] + model["written"]["low"]
    high = model["read"]["high"] + model["written"]["high"]
    measured = sum(launch.dram_read + launch.dram_written for launch in warm)
    interval = f"{_bytes(low)} to {_bytes(high)}"
    found.append(Check("whole program, warm: DRAM", interval, _bytes(measured), low <= measured <= high))
    return found


def build(case: str):
    """The function of a case and its arguments' shapes."""
    import jax

    import jaxattn

    if case == "stream":
        return lambda x: x * 2 + 1, [jax.ShapeDtypeStruct((1 << 28,), "float32")]
    shape = jax.ShapeDtypeStruct((1, 1024 if case == "blockwise" else 4096, 8, 64), "bfloat16")

    def attention(q, k, v):
        return jaxattn.dot_product_attention(q, k, v, is_causal=True, implementation=case)

    return attention, [shape] * 3


def run_case(case: str) -> None:
    """One profiled call of a case; meant to run under `ncu --profile-from-start off`."""
    import jax

    fn, shapes = build(case)
    arguments = [jax.random.normal(jax.random.key(i), s.shape, s.dtype) for i, s in enumerate(shapes)]
    compiled = jax.jit(fn).lower(*arguments).compile()
    for _ in range(3):
        jax.block_until_ready(compiled(*arguments))
    driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
    for code in (  # JAX leaves no context current on this thread, and the profiler wants one: the one that JAX uses
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        driver.cuCtxSetCurrent(context),
        driver.cuProfilerStart(),
    ):
        if code:
            raise RuntimeError(f"CUDA's profiler did not start: error {code}")
    jax.block_until_ready(compiled(*arguments))
    driver.cuProfilerStop()


def count(case: str, flush: bool) -> list[Launch]:
    """Runs a case under `ncu` and reads its counters."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--target-processes", "all", "--clock-control", "none"]
        command += ["--cache-control", "all" if flush else "none", "--profile-from-start", "off"]
        command += ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)]
        command += ["--log-file", str(log), sys.executable, "-m", "bench.counters", "--run", case]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        text = log.read_text() if log.exists() else ""
        if '"ID"' not in text:
            raise RuntimeError(f"ncu failed on {case}: {(text + done.stdout + done.stderr).strip()[-1500:]}")
        return parse(text)


def measure(case: str) -> dict:
    """Report and counters of one case, JSON-ready."""
    import jax

    from jaxattn import profiler
    from jaxattn.profiler import targets

    fn, shapes = build(case)
    report = profiler.profile(fn, *shapes)
    rows = [dataclasses.asdict(row) for row in report.rows]
    device = jax.devices()[0]
    facts = targets.here(device.platform, device.device_kind)
    cold, warm = count(case, flush=True), count(case, flush=False)
    joined, remarks = join(rows, cold, warm)
    found = checks(joined, warm, dataclasses.asdict(report.dram.warm), facts.l2_bytes)
    return {
        "case": case,
        "joined": [dataclasses.asdict(row) for row in joined],
        "checks": [dataclasses.asdict(check) for check in found],
        "remarks": remarks,
        "launches": {name: [dataclasses.asdict(x) for x in xs] for name, xs in (("cold", cold), ("warm", warm))},
    }


def table(result: dict) -> str:
    """One case as text: every kernel, then the checks."""
    form = "{:<36}{:>6}{:>12}{:>12}{:>12}{:>12}{:>12}{:>10}"
    heads = ("kernel", "calls", "requested", "DRAM read", "requested", "L2 write", "DRAM write", "us")
    kinds = ("", "", "read", "cold", "written", "", "warm", "")
    lines = [
        f"{result['case']}: requested is counted by the profiler, DRAM and L2 by the hardware",
        form.format(*heads),
    ]
    lines.append(form.format(*kinds))
    for row in result["joined"]:
        amounts = (
            row[k] for k in ("requested_read", "dram_read_cold", "requested_written", "l2_written", "dram_written")
        )
        lines.append(form.format(row["kernel"][:35], row["launches"], *map(_bytes, amounts), f"{row['time_us']:.1f}"))
    for check in result["checks"]:
        verdict = "holds" if check["holds"] else "DOES NOT HOLD"
        lines.append(f"{verdict}: {check['what']}: model {check['model']}, measured {check['measured']}")
    return "\n".join([*lines, *(f"Remark: {text}" for text in result["remarks"])])


def _bytes(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.4g} {unit}"
    return f"{n:.0f} B"


def main(argv: list[str]) -> int:
    """Hardware counters of attention and of a streaming kernel, beside the profiler's numbers; returns
    `commands.MISSING` where a tool is absent, 1 where a case failed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench counters", description=main.__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help=f"default: {', '.join(DEFAULT_CASES)}")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.run:
        run_case(arguments.run)
        return 0
    absent = missing()
    if absent:
        print(f"Nothing was counted: {' and '.join(absent)}.", file=sys.stderr)
        return commands.MISSING
    os.environ.update(FLAGS)  # before jax starts here: the children need the GPU's memory, and the same programs
    now = datetime.datetime.now(datetime.UTC)
    slug = environment.slug(environment.nvidia_gpu())
    folder = arguments.out or ROOT / "bench/results/runs" / f"{now:%Y%m%dT%H%M%SZ}-counters-{slug}"
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "kind": "counters",
        "schema": 1,
        "device": environment.nvidia_gpu(),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "date": now.isoformat(timespec="seconds"),
        "cases": [],
    }
    status = 0
    for case in arguments.case or DEFAULT_CASES:
        try:
            data["cases"].append(measure(case))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"{case}: {error}", file=sys.stderr)
            status = 1
            continue
        print(table(data["cases"][-1]) + "\n")
        result_files.write_text(folder / "counters.json", json.dumps(data, indent=1) + "\n")
    if data["cases"]:
        print(folder / "counters.json")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
