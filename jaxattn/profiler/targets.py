"""Facts of the devices that programs are profiled for, also where the device is not there.

The numbers are the vendor's; `config` renders them in the form in which XLA's compiler takes a GPU.
"""

import dataclasses
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Target:
    """One device.

    `l2_bytes` is the last cache before memory; `peak_flops` is the dense bfloat16 matrix rate (float16 on
    T4); zero stands for unknown.
    """

    slug: str
    name: str
    platform: str
    cores: int
    l2_bytes: int
    bytes_per_s: int
    memory_bytes: int
    peak_flops: float
    capability: tuple[int, int] = (0, 0)
    clock_ghz: float = 0.0
    shared_bytes_per_core: int = 0
    shared_bytes_per_block: int = 0
    threads_per_core: int = 2048
    fpus_per_core: int = 128
    accelerated: bool = False

    @property
    def arch(self) -> str:
        """The name that NVIDIA's assembler uses, e.g. sm_90a."""
        return f"sm_{self.capability[0]}{self.capability[1]}{'a' if self.accelerated else ''}"

    @property
    def config(self) -> str:
        """XLA's GpuTargetConfig as text: what its compiler asks a driver for where there is one."""
        major, minor = self.capability
        extension = " feature_extension: ACCELERATED_FEATURES" if self.accelerated else ""
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_bytes_per_core} threads_per_core_limit: {self.threads_per_core}
  core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bytes_per_s} l2_cache_size: {self.l2_bytes} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes} shared_memory_per_block_optin: {self.shared_bytes_per_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
device_description_str: "{self.name}"
"""


_H100 = Target(
    "h100", "NVIDIA H100 80GB HBM3", "cuda", cores=132, l2_bytes=52428800, bytes_per_s=3352320000000,
    memory_bytes=84942979072, peak_flops=989.4e12, capability=(9, 0), clock_ghz=1.98,
    shared_bytes_per_core=233472, shared_bytes_per_block=232448, accelerated=True,
)  # fmt: skip

TARGETS = {
    t.slug: t
    for t in (
        dataclasses.replace(
            _H100,
            slug="h200",
            name="NVIDIA H200 141GB HBM3e",
            bytes_per_s=4800000000000,
            memory_bytes=151397597184,
        ),
        _H100,
        Target(
            "a100", "NVIDIA A100-SXM4-80GB", "cuda", cores=108, l2_bytes=41943040, bytes_per_s=2039000000000,
            memory_bytes=85899345920, peak_flops=312e12, capability=(8, 0), clock_ghz=1.41,
            shared_bytes_per_core=167936, shared_bytes_per_block=166912, fpus_per_core=64,
        ),
        Target(
            "l4", "NVIDIA L4", "cuda", cores=58, l2_bytes=50331648, bytes_per_s=300000000000,
            memory_bytes=24152899584, peak_flops=121e12, capability=(8, 9), clock_ghz=2.04,
            shared_bytes_per_core=102400, shared_bytes_per_block=101376, threads_per_core=1536,
        ),
        Target(
            "t4", "Tesla T4", "cuda", cores=40, l2_bytes=4194304, bytes_per_s=320000000000,
            memory_bytes=15843721216, peak_flops=65e12, capability=(7, 5), clock_ghz=1.59,
            shared_bytes_per_core=65536, shared_bytes_per_block=65536, threads_per_core=1024,
            fpus_per_core=64,
        ),
        Target(
            "b200", "NVIDIA B200", "cuda", cores=148, l2_bytes=132644864, bytes_per_s=8000000000000,
            memory_bytes=191507857408, peak_flops=2250e12, capability=(10, 0), clock_ghz=1.965,
            shared_bytes_per_core=233472, shared_bytes_per_block=232448, accelerated=True,
        ),
    )
}  # fmt: skip


def get(slug: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: naming the known ones.

    Example:
        >>> get("h200").arch
        'sm_90a'
    """
    if slug not in TARGETS:
        raise ValueError(f"target={slug!r} is not known: {', '.join(TARGETS)} are")
    return TARGETS[slug]


def here(platform: str, kind: str) -> Target:
    """The device that is there: a known GPU by its kind, else what the machine tells of itself.

    Args:
        platform: JAX's platform name, e.g. `cpu`.
        kind: JAX's `device_kind`, e.g. `NVIDIA H200`.
    """
    for target in TARGETS.values():
        if platform in ("gpu", "cuda") and target.slug.upper() in kind.upper().replace("-", " ").split():
            return target
    if platform == "cpu":
        return Target("cpu", _cpu_name(), "cpu", os.cpu_count() or 1, _last_level_cache_bytes(), 0, 0, 0.0)
    return Target(kind.lower().replace(" ", "-"), kind, platform, 1, 0, 0, 0, 0.0)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _last_level_cache_bytes() -> int:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:])
        sizes.append(int(size[:-1]) * unit if unit else int(size or 0))
    return max(sizes, default=0)
