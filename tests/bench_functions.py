"""Implementations as a user would bring them, some of them bad: `--impl tests.bench_functions:right`."""

import os

import jax
import jax.numpy as jnp


def right(query, key, value, **arguments):
    return jax.nn.dot_product_attention(query, key, value, implementation="xla", **arguments)


def wrong(query, key, value, is_causal=False, mask=None):
    """Forgets the mask."""
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def short(query, key, value, **arguments):
    """Gives the first five queries only."""
    return right(query, key, value, **arguments)[:, :5]


def halved(query, key, value, **arguments):
    """Gives another dtype than it was given."""
    return right(query, key, value, **arguments).astype(jnp.bfloat16)


def twice(query, key, value, **arguments):
    return (right(query, key, value, **arguments), 1.0)


def nothing(query, key, value, **arguments):
    return None


def torch_double(query, key, value, **arguments):
    return torch_right(query, key, value, **arguments).double()


def crashing(query, key, value, **arguments):
    os.abort()


def crashing_later(query, key, value, **arguments):
    """Right five times, then the process ends."""
    crashing_later.calls += 1
    if crashing_later.calls > 5:
        os.abort()
    return torch_right(query, key, value, **arguments)


crashing_later.calls = 0


def too_large(query, key, value, **arguments):
    raise MemoryError("no room for the scores")


def wasteful(query, key, value, **arguments):
    """Compiles to a petabyte of temporaries, and must not be run."""
    n = 1 << 24
    huge = jnp.sort(jnp.broadcast_to(query.sum(), (n, n)) * jnp.arange(n, dtype=jnp.float32), axis=0)
    return right(query, key, value, **arguments) + huge[::2].sum() * 0


def torch_right(query, key, value, **arguments):
    import torch

    query, key, value = (array.transpose(1, 2) for array in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **arguments)
    return out.transpose(1, 2)
