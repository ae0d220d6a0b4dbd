"""The torch side: what jaxattn is compared with, and the comparison.

The reference modules (`attention`, `llama`, `checkpoint`) import torch, transformers and numpy, never jax or
jaxattn, so that a mistake cannot be shared by both sides; `parity`, `faults` and the command line join the
two. NumPy arrays cross the boundary (bfloat16 as ml_dtypes' dtype), torch tensors never do.
"""
