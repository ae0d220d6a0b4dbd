"""Loops over batch and heads that stay on their device when arrays are sharded, and batch under vmap.

XLA cannot split a loop whose trip counts the batch: it would gather the operands first. Here the partitioner is told
that batch elements and key/value heads are independent, so each device runs the loop over its own share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def independent(function: Callable, axes_in, axes_out, summed=None) -> Callable:
    """The function, made to run on shards of its batch and head axes without communication.

    Args:
      function: takes and returns pytrees of arrays; works on any B and K it is given.
      axes_in: as the arguments, a tuple with a string for each array, a letter an axis: `b` batch, `k` key/value
        heads, `n` query heads (k-major), `.` any other axis, never sharded. Axes of length 1 are broadcast.
      axes_out: as the result, likewise.
      summed: as the result, the letters over which shards must be added up, because the result does not have
        these axes; "" for none.

    Returns:
      A function of the same arguments. Under vmap it runs once per element, one after the other.
    """

    @sequential_vmap
    def call(*args):
        flat, tree = jax.tree.flatten(args)
        letters_in = _letters(axes_in, args)
        sizes = {}
        for array, letters in zip(flat, letters_in, strict=True):
            sizes |= {x: n for x, n in zip(letters, array.shape, strict=True) if x in "bkn"}

        @functools.partial(jax.jit, inline=True)  # its shapes and its use share one trace
        def flat_function(*flat):
            return function(*jax.tree.unflatten(tree, flat))

        shapes = jax.eval_shape(flat_function, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat))
        letters_out = _letters(axes_out, shapes)
        sums = [""] * len(letters_out) if summed is None else jax.tree.leaves(summed)

        def local(split):
            def run(*flat):
                results = []
                for result, over in zip(jax.tree.leaves(flat_function(*flat)), sums, strict=True):
                    names = tuple(split[letter] for letter in over if split[letter] is not None)
                    results.append(jax.lax.psum(result, names) if names else result)
                return tuple(results)

            return run

        def partition(mesh, arg_shapes, result_shapes):
            split = _split(letters_in, [x.sharding.spec for x in arg_shapes])
            outer, inner = (
                tuple(NamedSharding(mesh, spec) for spec in _specs(letters, split))
                for letters in (letters_out, letters_in)
            )
            return mesh, local(split), outer, inner

        split = _split(letters_in, [jax.typeof(x).sharding.spec for x in flat])
        if any(split.values()):  # a mesh with explicit axes: the types say how the arrays are split
            results = jax.shard_map(
                local(split),
                in_specs=tuple(_specs(letters_in, split)),
                out_specs=tuple(_specs(letters_out, split)),
                check_vma=False,
            )(*flat)
        else:  # the partitioner decides, or there is one device
            partitioned = custom_partitioning(lambda *flat: tuple(jax.tree.leaves(flat_function(*flat))))
            partitioned.def_partition(partition=partition, **_sharding_rule(letters_in, letters_out, sizes))
            results = partitioned(*flat)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


def _split(all_letters, specs) -> dict:
    """The mesh axis, if any, that splits the batch (b), and the one that splits the heads (k and n)."""
    split = {"b": None, "k": None}
    for letters, spec in zip(all_letters, specs, strict=True):
        for letter, axis in zip(letters, spec, strict=False):
            if letter in split and split[letter] is None:
                split[letter] = axis
    if split["k"] == split["b"]:  # one mesh axis cannot split both
        split["k"] = None
    return split | {"n": split["k"]}


def _specs(all_letters, split) -> list[PartitionSpec]:
    return [PartitionSpec(*(split.get(letter) for letter in letters)) for letters in all_letters]


def _letters(axes, arrays) -> list[str]:
    """One string for each array; axes of length 1 cannot be split and become `.`."""
    letters = jax.tree.leaves(axes)
    return [
        "".join("." if n == 1 else x for x, n in zip(names, array.shape, strict=True))
        for names, array in zip(letters, jax.tree.leaves(arrays), strict=True)
    ]


def _sharding_rule(letters_in, letters_out, sizes) -> dict:
    """The rule in Shardy's notation: b and k are shared factors, n is k times the heads of a group, others alone."""
    others: list[str] = []  # in order of appearance, as Shardy wants them

    def name(letter):
        if letter in "bk":
            return letter
        if letter == "n" and sizes.get("k", 1) > 1:
            if sizes["k"] == sizes["n"]:
                return "k"
            if "g" not in others:
                others.append("g")
            return "(k g)"
        others.append(f"x{len(others)}")
        return others[-1]

    def side(all_letters):
        return ", ".join(" ".join(map(name, letters)) for letters in all_letters)

    rule = f"{side(letters_in)} -> {side(letters_out)}"
    group = {"g": sizes["n"] // sizes["k"]} if "g" in others else {}
    return {"sharding_rule": rule, "need_replication_factors": tuple(others), **group}
