"""What the figures were taken on: device, versions, threads, memory.

Design fact: found out in a child process, so that the parent that starts measurements holds no framework,
no thread pool and no GPU memory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import results

PACKAGES = (
    "jaxattn",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "torch",
    "transformers",
    "tokamax",
    "matplotlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)
KERNEL_CAPABILITY = 8.0  # what Pallas' Triton backend needs of an NVIDIA GPU
CUDA_INSTALL = "pip install -e '.[all,cuda]'"


def describe(device: str = "auto") -> dict:
    """The device that jax uses and what surrounds it; `device` may ask for "cpu".

    Returns: JSON-ready values. `notes` are sentences for the reader: a GPU that is not used, and why.
    """
    import jax

    kind = "cuda" if jax.default_backend() in ("gpu", "cuda") else jax.default_backend()
    gpu = nvidia_gpu()
    notes = []
    if gpu and kind != "cuda" and device != "cpu":
        notes.append(f"An NVIDIA GPU is here ({gpu}) but jax runs on the CPU. To measure the GPU: {CUDA_INSTALL}")
    load = os.getloadavg()[0]
    if load > cores() / 2:
        notes.append(
            f"Other work was running at the start (load average {load:.1f} on {cores()} cores): times are longer "
            "than this machine's own."
        )
    found = {
        "device": kind,
        "device_name": jax.devices()[0].device_kind if kind == "cuda" else processor(),
        "compute_capability": getattr(jax.devices()[0], "compute_capability", None),
        "nvidia_gpu": gpu,
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": cores(),
        "memory_bytes": available_bytes(),
        "load_average": load,
        "notes": notes,
    }
    if kind == "cuda":
        statistics = jax.devices()[0].memory_stats() or {}
        found["memory_bytes"] = statistics.get("bytes_limit")
        capability = found["compute_capability"]
        if capability and float(capability) < KERNEL_CAPABILITY:
            notes.append(
                f"Compute capability {capability}: Pallas' Triton backend needs {KERNEL_CAPABILITY} or more; "
                "blockwise and the peers run."
            )
        found["torch_cuda"] = torch_cuda()
        if found["torch_cuda"] is not True:
            notes.append(f"torch rows are left out: {found['torch_cuda']}")
    return found


def torch_cuda() -> bool | str:
    """True where torch sees the GPU, else the reason why it does not."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    if torch.cuda.is_available():
        return True
    return f"torch {torch.__version__} has no CUDA device"


def versions() -> dict[str, str]:
    """Installed versions of what matters, by package."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def nvidia_gpu() -> str | None:
    """The name of a visible NVIDIA GPU, whether or not jax can use it."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            result = None
        if result is not None and result.returncode == 0 and result.stdout.strip():
            return result.stdout.strip().splitlines()[0]
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"Model:\s*(.+)", path.read_text())
        return match.group(1).strip() if match else "NVIDIA GPU"
    return None


def processor() -> str:
    """The CPU's name, as the system gives it."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that a new process can have: what the kernel calls available, or less by a cgroup's limit.

    Elsewhere than on Linux: the machine's memory.
    """
    try:
        match = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = int(match.group(1)) * 1024
    for limit_path, used_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = Path(limit_path).read_text().strip(), int(Path(used_path).read_text())
            statistics = Path(used_path).with_name("memory.stat").read_text()
        except OSError:
            continue
        if limit != "max":
            reclaimable = re.search(r"^(?:total_)?inactive_file (\d+)", statistics, re.MULTILINE)
            used -= int(reclaimable.group(1)) if reclaimable else 0
            available = min(available, int(limit) - used)
    return available


def commit() -> str | None:
    """The git commit of this checkout, with "+changes" where files differ from it."""
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def code(modules: Iterable[str] = ()) -> dict[str, str]:
    """Digests of the source that measures: the checkout's Python files and the library's tables of tile sizes, and
    for each of a user's modules that is found the Python files of its whole package.

    >>> list(code())
    ['jaxattn, oracle, bench']
    """
    root = Path(__file__).parent.parent
    patterns = ("jaxattn/**/*.py", "jaxattn/**/*.json", "oracle/**/*.py", "bench/**/*.py")
    found = {results.CHECKOUT: digest((root, path) for pattern in patterns for path in root.glob(pattern))}
    for module in modules:
        if files := sources(module):
            found[module] = digest(files)
    return found


def sources(module: str) -> list[tuple[Path, Path]]:
    """(folder, file in it) for the Python files of the top-level package that holds a module, none where it is not
    found. Nothing is imported: this process holds no framework, and what a user's package does is the child's.
    """
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        folders = map(Path, spec.submodule_search_locations)
        return [(folder, path) for folder in folders for path in folder.rglob("*.py")]
    return [(Path(spec.origin).parent, Path(spec.origin))] if spec.has_location else []


def digest(files: Iterable[tuple[Path, Path]]) -> str:
    """A short digest of the contents of (folder, file in it), and of their names from the folder."""
    parts = (
        f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for folder, path in files
    )
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:12]


def slug(name: str) -> str:
    """A device's name as a folder name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or sys.platform
