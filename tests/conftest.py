"""Eight virtual devices for the sharding tests, quick compilation, and hypothesis without deadlines.

Each of the hundreds of programs runs once or twice, so LLVM optimises them less: half the time of the suite. XLA's
own optimisation, which decides buffers, fusions and collectives, is the full one.
"""

import os

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

from hypothesis import settings  # noqa: E402  (what it imports may import jax)

settings.register_profile("jaxattn", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("jaxattn")
