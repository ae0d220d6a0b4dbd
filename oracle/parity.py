"""Parity: jaxattn's attention layer against Hugging Face's, stage by stage, each judged by the accuracy rule.

Design fact: the comparison uses public names only (`llama.load_attention`, `Attention.stages`), so that it
tests what a user would run; and it is run with planted faults too (`oracle.faults`), since a comparison that
cannot fail proves nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import llama, rope
from oracle import checkpoint as checkpoint_
from oracle import llama as reference
from oracle.attention import Verdict, judge

# Several key blocks per row at these lengths, or the accumulator would never be rescaled.
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Subject:
    """A layer to compare: Hugging Face's model and layer number, our configuration, and the layer's input.

    x: [B, T, D]. positions: int [T]. eager: run ours without jit (explicit loops compile slowly).
    """

    name: str
    model: Any
    config: llama.LlamaConfig
    x: np.ndarray
    positions: np.ndarray
    layer: int = 0
    eager: bool = False

    def case(self, dtype: str) -> reference.Case:
        """What torch says: see `oracle.llama.layer_case`."""
        return reference.layer_case(self.model, self.x, dtype, layer=self.layer, positions=self.positions)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the parity table."""

    subject: str
    implementation: str
    dtype: str
    stage: str
    verdict: Verdict

    def __str__(self) -> str:
        v = self.verdict
        return (
            f"{self.subject:<22} {self.implementation:<18} {self.dtype:<9} {self.stage:<14} "
            f"{v.max_abs:>9.2e} {v.rmse:>9.2e} {v.bound:>9.2e} {'ok' if v else 'FAIL: ' + v.reason}"
        )


_COLUMNS = ("subject", "implementation", "dtype", "stage", "max abs", "RMSE", "allowed")
HEADER = "{:<22} {:<18} {:<9} {:<14} {:>9} {:>9} {:>9} verdict".format(*_COLUMNS)


def our_stages(
    config: llama.LlamaConfig, case: reference.Case, implementation, *, eager=False
) -> dict[str, np.ndarray]:
    """Every stage of jaxattn's layer, with the case's weights and inputs.

    Args: config: sizes and RoPE. case: from the reference. implementation: as in `dot_product_attention`.
    Returns: stage -> array, heads as [B, T, N, H].
    Raises: ValueError where the weights do not fit the configuration.
    """
    layer = llama.load_attention(config, case.weights, implementation=implementation)

    def run(layer, x, positions):
        return layer.stages(x, positions=positions, residual=True)

    run = run if eager else nnx.jit(run)
    stages = run(layer, jnp.asarray(case.x), jnp.asarray(case.positions))
    return {name: np.asarray(value) for name, value in stages._asdict().items()}


def compare(subject: Subject, case: reference.Case, dtype: str, implementation) -> list[Row]:
    """The rows of one subject, dtype and implementation, in the order of the stages.

    Besides the stages there is "vs HF layer": the output against Hugging Face's in the same dtype. In
    float32 its largest error may be 2e-5 of the output's RMS, in other dtypes the sum of both sides' allowed
    errors.
    """
    ours = our_stages(subject.config, case, implementation, eager=subject.eager)
    label = implementation if isinstance(implementation, str) else implementation.name
    verdicts = {stage: judge(stage, ours[stage], case.targets[stage]) for stage in reference.STAGES}
    verdicts["vs HF layer"] = _against_layer(ours["output"], case, dtype)
    return [Row(subject.name, label, dtype, stage, verdict) for stage, verdict in verdicts.items()]


def _against_layer(output: np.ndarray, case: reference.Case, dtype: str) -> Verdict:
    target = case.targets["output"]
    difference = np.asarray(output, np.float64) - np.asarray(case.plain_output, np.float64)
    rmse, max_abs = float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max())
    if dtype == "float32":
        bound = 2e-5 * float(np.sqrt(np.mean(target.value**2)))
        reason = "" if max_abs <= bound else f"max abs {max_abs / bound:.3g} times what float32 should reach"
    else:
        bound = target.bound + target.plain_rmse
        reason = "" if rmse <= bound else f"{rmse / bound:.3g} times the allowed error"
    return Verdict("vs HF layer", rmse, max_abs, bound, target.plain_rmse, reason)


def llama_subject(
    folder, *, layer: int = 0, tokens: int = 256, first_position: int = 0, seed: int = 0, name: str | None = None
) -> Subject:
    """A layer of a Llama checkpoint on random tokens, its input being what the model feeds it.

    Args: folder: a local checkpoint. layer: which layer. tokens: T. first_position: of the first token.
    """
    model = checkpoint_.load_model(folder)
    config = llama.LlamaConfig.from_folder(folder)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (1, tokens))
    x = reference.attention_input(model, ids, layer=layer)
    return Subject(name or "llama", model, config, x, first_position + np.arange(tokens), layer)


def partial_subject(*, tokens: int = 64, seed: int = 0) -> Subject:
    """A small StableLM layer from a seed, which rotates a quarter of each head.

    transformers' Llama ignores partial_rotary_factor, so it cannot be the oracle for it.
    """
    import torch
    from transformers import StableLmConfig, StableLmForCausalLM

    hf = StableLmConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = StableLmForCausalLM(hf).eval()
    with torch.no_grad():
        for name, parameter in model.model.layers[0].self_attn.named_parameters():
            peak = 5.0**0.5 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.normal_().mul_(peak * parameter.shape[1] ** -0.5)
    config = llama.LlamaConfig(64, 128, 64, 1, 4, 2, 32, rope.from_hf(hf.to_dict()))
    x = np.random.default_rng(seed).normal(size=(1, tokens, 128)).astype(np.float32)
    return Subject("stablelm, partial RoPE", model, config, x, np.arange(tokens))


def implementations(names: Sequence[str]) -> list:
    """Implementation objects for parity: blockwise with several key blocks, triton interpreted where there
    is no GPU."""
    import jaxattn

    objects = {"blockwise": lambda: jaxattn.Blockwise(block_q=BLOCK, block_k=BLOCK)}
    if jax.default_backend() != "gpu":
        objects["triton"] = lambda: jaxattn.Triton(interpret=True)
    return [objects[name]() if name in objects else name for name in names]
