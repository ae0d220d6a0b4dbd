"""From a lowered program to the compiled module: on this machine, or for a GPU that is not there.

For a target the program goes as StableHLO to a child process which alone sees the compile wheels: a plain
`import jax` beside those wheels would try to start a driver.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib

from jaxattn.profiler import hlo, private_jax, wire
from jaxattn.profiler.targets import Target

_TIMEOUT_S = 600
# Of LLVM's work on a CPU; XLA's passes, which decide kernels and buffers, are not touched.
_UNOPTIMISED_CODE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program; sizes in bytes, of one device where it is partitioned.

    `ptx` and `launches` are there for a compiled GPU target only.
    """

    module: hlo.Module
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    devices: int = 1
    ptx: tuple[str, ...] = ()
    launches: str = ""

    @property
    def peak_bytes(self) -> int:
        """Arguments + outputs + temporaries - what outputs share with arguments."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes


def wheels_folder() -> Path:
    """Where `python -m jaxattn.profiler wheels` puts the compile wheels of this Python and jaxlib."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return Path.home() / ".cache" / "jaxattn" / f"compile-wheels-{jaxlib.__version__}-{python}"


def wheel_requirements() -> list[str]:
    """What pip is asked for: the GPU plugin of this jaxlib, and the parts of the CUDA compiler."""
    version = jaxlib.__version__
    return [
        f"jax-cuda13-plugin=={version}",
        f"jax-cuda13-pjrt=={version}",
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cuda-runtime",
        "nvidia-cuda-crt",
    ]


def install_wheels(folder: Path | None = None) -> Path:
    """Installs the compile wheels into their own folder (about 250 MB to fetch, 720 MB on disk).

    Args:
        folder: where to; `wheels_folder()` if None.

    Returns:
        The folder, to be named as `wheels=` where it is not the default.

    Raises:
        RuntimeError: if pip fails; what it printed stands above.
    """
    folder = Path(folder or wheels_folder())
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(folder)]
    if subprocess.run([*command, *wheel_requirements()]).returncode:
        raise RuntimeError(f"pip could not install the compile wheels into {folder}")
    return folder


def find_wheels(folder: Path | str | None = None) -> Path:
    """The folder of the compile wheels.

    Raises:
        FileNotFoundError: with the command that installs them.
    """
    path = Path(folder) if folder is not None else wheels_folder()
    if not (path / "jax_plugins" / "xla_cuda13").is_dir():
        where = f" --to {path}" if folder is not None else ""
        raise FileNotFoundError(
            f"no compile wheels for jaxlib {jaxlib.__version__} in {path}: python -m jaxattn.profiler wheels{where}"
        )
    return path


def compile_here(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles for the device that the program was lowered for; it is read, not run, so LLVM need not optimise it."""
    on_cpu = jax.default_backend() == "cpu"
    compiled = lowered.compile(compiler_options=_UNOPTIMISED_CODE if on_cpu else None)
    raw = compiled.runtime_executable().hlo_modules()
    if len(raw) != 1:
        raise NotImplementedError(f"the program compiled to {len(raw)} modules; one is supported")
    text = raw[0].to_string()
    stats = compiled.memory_analysis()
    return Compiled(
        module=hlo.parse(raw[0].as_serialized_hlo_module_proto(), text, stats.serialized_buffer_assignment_proto),
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        devices=len(compiled.runtime_executable().local_devices()),
    )


def compile_for(
    lowered: jax.stages.Lowered,
    target: Target,
    wheels: Path | str | None = None,
    options: dict | None = None,
) -> Compiled:
    """Compiles a program lowered for CUDA in a child process, for a GPU that need not be there.

    Args:
        lowered: from `jit(f).trace(...).lower(lowering_platforms=("cuda",))`.
        target: the GPU.
        wheels: folder of the compile wheels; the default folder if None.
        options: further XLA options, e.g. `{"xla_gpu_autotune_level": 0}`.

    Raises:
        FileNotFoundError: if the wheels are not there.
        RuntimeError: if the compiler fails, with its last lines.
    """
    folder = find_wheels(wheels)
    with tempfile.TemporaryDirectory(prefix="jaxattn-profiler-") as temporary:
        work = Path(temporary)
        (work / "program.mlirbc").write_bytes(private_jax.stablehlo_bytecode(lowered))
        request = {"target_config": target.config, "options": options or {}}
        (work / "request.json").write_text(json.dumps(request))
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
        environment |= {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
        child = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("child.py")), str(work)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        if child.returncode:
            lines = "\n".join(child.stderr.strip().splitlines()[-15:])
            raise RuntimeError(f"compiling for {target.name} failed:\n{lines}")
        stats = json.loads((work / "stats.json").read_text())
        dump = work / "dump"
        return Compiled(
            module=_dumped_module(dump, (work / "name.txt").read_text()),
            argument_bytes=stats["argument"],
            output_bytes=stats["output"],
            temp_bytes=stats["temp"],
            alias_bytes=stats["alias"],
            ptx=tuple(path.read_text() for path in sorted(dump.glob("*.ptx"))),
            launches="".join(path.read_text() for path in sorted(dump.glob("*.thunk_sequence.txt"))),
        )


def _dumped_module(dump: Path, name: str) -> hlo.Module:
    """The module that the buffers were assigned to, which the executable keeps in a later form."""
    found = sorted(dump.glob("*_after_optimizations.hlo.pb"))
    for path in found:
        fields = wire.message(path.read_bytes())
        if wire.text(wire.message(fields[1][-1]), 1) == name:
            text = path.with_name(path.name.removesuffix(".hlo.pb") + ".txt").read_text()
            return hlo.parse(fields[1][-1], text, fields[3][-1] if 3 in fields else b"")
    raise RuntimeError(f"the compiler dumped no module named {name}: found {[p.name for p in found]}")
