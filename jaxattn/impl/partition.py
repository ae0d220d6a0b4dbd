"""Loops over batch and heads that stay on their device when arrays are sharded, and batch under vmap or in `shard_map`.

XLA cannot split a loop whose trip counts the batch: it would gather the operands first. Here the partitioner is told
that batch elements and key/value heads are independent, so each device runs the loop over its own share.
"""

from __future__ import annotations

import functools
import math
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
        sizes = {"k": 1}
        for array, letters in zip(flat, letters_in, strict=True):
            sizes |= {x: n for x, n in zip(letters, array.shape, strict=True) if x in "bkn"}

        @functools.partial(jax.jit, inline=True)  # its shapes and its use share one trace
        def flat_function(*flat):
            return function(*jax.tree.unflatten(tree, flat))

        shapes = jax.eval_shape(flat_function, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat))
        letters_out, names_out = _letters(axes_out, shapes), jax.tree.leaves(axes_out)
        sums = [""] * len(letters_out) if summed is None else jax.tree.leaves(summed)

        def local(split):
            def run(*flat):
                if split["shared"]:  # key/value heads are whole: each shard takes those that its query heads read
                    head = jax.lax.axis_index(split["n"]) * sizes["k"] // split["count"]
                    width = max(sizes["k"] // split["count"], 1)
                    flat = [
                        jax.lax.dynamic_slice_in_dim(x, head, width, letters.index("k")) if "k" in letters else x
                        for x, letters in zip(flat, letters_in, strict=True)
                    ]
                results = []
                for x, letters, over in zip(jax.tree.leaves(flat_function(*flat)), names_out, sums, strict=True):
                    if split["shared"] and "k" in letters:
                        shape = [sizes["k"] if letter == "k" else n for letter, n in zip(letters, x.shape, strict=True)]
                        x = jax.lax.dynamic_update_slice_in_dim(
                            jax.numpy.zeros(shape, x.dtype), x, head, letters.index("k")
                        )
                        over += "n"
                    names = [name for letter in over for name in _names(split[letter])]
                    results.append(jax.lax.psum(x, tuple(names)) if names else x)
                return tuple(results)

            return run

        def partition(mesh, arg_shapes, result_shapes):
            split = _split(letters_in, [x.sharding.spec for x in arg_shapes], sizes, mesh.shape)
            outer, inner = (
                tuple(NamedSharding(mesh, spec) for spec in _specs(letters, split))
                for letters in (letters_out, letters_in)
            )
            return mesh, local(split), outer, inner

        types = [jax.typeof(x).sharding for x in flat]
        split = _split(letters_in, [x.spec for x in types], sizes, types[0].mesh.shape)
        if split["b"] or split["n"]:  # a mesh with explicit axes: the types say how the arrays are split
            specs = _specs(letters_in, split)
            flat = [jax.reshard(x, spec) for x, spec in zip(flat, specs, strict=True)]
            results = jax.shard_map(
                local(split),
                in_specs=tuple(specs),
                out_specs=tuple(_specs(letters_out, split)),
                check_vma=False,
            )(*flat)
        else:  # the partitioner decides, or there is one device
            partitioned = custom_partitioning(lambda *flat: tuple(jax.tree.leaves(flat_function(*flat))))
            partitioned.def_partition(partition=partition, **_sharding_rule(letters_in, letters_out))
            results = partitioned(*flat)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


def _split(all_letters, specs, sizes, mesh_shape) -> dict:
    """The mesh axes that split batch (b), query heads (n) and key/value heads (k); None for what stays whole.

    Where key/value heads are whole while query heads are split into `count` shards, they are `shared`.
    """
    axes: dict = {"b": None, "k": None, "n": None}
    for letters, spec in zip(all_letters, specs, strict=True):
        for letter, axis in zip(letters, spec, strict=False):
            if letter in axes and axes[letter] is None:
                axes[letter] = axis
    heads, K = axes["n"] if axes["k"] is None else axes["k"], sizes["k"]
    count = math.prod(mesh_shape[name] for name in _names(heads))
    if set(_names(heads)) & set(_names(axes["b"])) or (K % count and count % K):
        heads, count = None, 1  # one mesh axis cannot split both; groups cannot be cut at other places
    shared = heads is not None and (axes["k"] is None or K % count != 0)
    return {"b": axes["b"], "n": heads, "k": None if shared else heads, "shared": shared, "count": count}


def _names(axis) -> tuple:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _specs(all_letters, split) -> list[PartitionSpec]:
    return [
        PartitionSpec(*(split[letter] if letter in "bkn" else None for letter in letters)) for letters in all_letters
    ]


def _letters(axes, arrays) -> list[str]:
    """One string for each array; axes of length 1 cannot be split and become `.`."""
    letters = jax.tree.leaves(axes)
    return [
        "".join("." if n == 1 else x for x, n in zip(names, array.shape, strict=True))
        for names, array in zip(letters, jax.tree.leaves(arrays), strict=True)
    ]


def _sharding_rule(letters_in, letters_out) -> dict:
    """The rule in Shardy's notation: b, k and n are factors that may be split, every other axis is one of its own."""
    others: list[str] = []  # in order of appearance, as Shardy wants them

    def name(letter):
        if letter in "bkn":
            return letter
        others.append(f"x{len(others)}")
        return others[-1]

    def side(all_letters):
        return ", ".join(" ".join(map(name, letters)) for letters in all_letters)

    rule = f"{side(letters_in)} -> {side(letters_out)}"
    return {"sharding_rule": rule, "need_replication_factors": tuple(others)}


def varying_alike(*arrays):
    """In a user's `shard_map`: every array made to vary over the mesh axes over which any does.

    Then so do the gradients, and those of an array that did not are added up over these axes.
    """

    def axes(x) -> frozenset:
        return jax.typeof(x).manual_axis_type.varying

    every = frozenset().union(*map(axes, jax.tree.leaves(arrays)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(sorted(every - axes(x), key=str)), to="varying"), arrays)
