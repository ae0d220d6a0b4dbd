"""Eight virtual devices for the sharding tests, and hypothesis without deadlines: the first example compiles."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from hypothesis import settings

settings.register_profile("jaxattn", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("jaxattn")
