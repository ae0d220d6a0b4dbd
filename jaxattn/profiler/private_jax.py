"""Every private name of JAX that the profiler uses: this file alone, tested on each supported version.

It imports JAX and the standard library only, since the child process that holds the compile wheels runs it
too, without the rest of the library.
"""

from typing import Any

import jax
from jax._src import compiler, source_info_util
from jax._src.interpreters import mlir
from jax._src.state.types import AbstractRef


def stablehlo_bytecode(lowered: jax.stages.Lowered) -> bytes:
    """The lowered program as MLIR bytecode, with its source locations."""
    return mlir.module_to_bytecode(lowered.compiler_ir("stablehlo"))


def compile_bytecode(program: bytes, target_config: str, options: dict[str, Any]) -> Any:
    """Compiles MLIR bytecode for a GPU that is described, not there; returns XLA's executable."""
    import jaxlib._jax
    from jax.experimental import topologies
    from jaxlib.mlir import ir

    topology = topologies.get_topology_desc(platform="cuda", target_config=target_config, topology="1x1x1")
    devices = topology.devices[:1]
    compile_options = compiler.get_compile_options(num_replicas=1, num_partitions=1, env_options_overrides=options)
    with mlir.make_ir_context():
        module = ir.Module.parse(program)
        return devices[0].client.compile(module, jaxlib._jax.DeviceList(tuple(devices)), compile_options)


def scan_arity(params: dict[str, Any], n_inputs: int) -> tuple[int, int]:
    """(constants, carried values) of a scan equation with that many inputs."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update([None] * n_inputs).unpack()  # since jax 0.11
    return len(list(consts)), len(list(carry))


def user_line(source_info: Any) -> str:
    """`file:line` of the code that made an equation, or ''."""
    frame = source_info_util.user_frame(source_info.traceback)
    return "" if frame is None else f"{frame.file_name}:{frame.start_line}"


def is_reference(aval: Any) -> bool:
    """Whether a kernel's value is a reference to memory, not the value of an array."""
    return isinstance(aval, AbstractRef)
