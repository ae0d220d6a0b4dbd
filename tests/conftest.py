"""Eight virtual devices for the sharding tests, quick compilation, and hypothesis without deadlines.

Each of the hundreds of programs runs once or twice, so nearly all of the suite's time is LLVM's, which is told to do as
little as it can. XLA's own optimisation, which decides buffers, fusions and collectives, is the full one; a flag in
XLA_FLAGS goes before these.
"""

import gc
import os
from importlib.metadata import version

gc.set_threshold(100_000, 20, 20)  # tracing makes many objects that live on in caches: looking through them is waste
LEVEL = int(os.path.exists("/dev/nvidiactl"))  # where there is a GPU, its kernels are compiled by the same flags
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    f"--xla_backend_optimization_level={LEVEL}",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # later ones end at a flag that is no more
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would only wait for each other and for other workers

from hypothesis import settings  # noqa: E402  (what it imports may import jax)

settings.register_profile("jaxattn", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("jaxattn")
