"""Memory traffic of jitted programs: what each compiled kernel reads and writes, and how often.

It needs nothing of the rest of the library, and profiles any jittable function.
"""

from jaxattn.profiler.compile import install_wheels
from jaxattn.profiler.profiler import profile
from jaxattn.profiler.report import Report, Row
from jaxattn.profiler.resources import KernelResources, kernel_resources
from jaxattn.profiler.targets import TARGETS, Target

__all__ = [
    "TARGETS",
    "KernelResources",
    "Report",
    "Row",
    "Target",
    "install_wheels",
    "kernel_resources",
    "profile",
]
