"""Parity: jaxattn's attention layer against Hugging Face's, stage by stage, each judged by the accuracy rule.

Design fact: the comparison uses public names only (`llama.load_attention`, `Attention.stages`), so that it
tests what a user would run; and it is run with planted faults too (`oracle.faults`), since a comparison that
cannot fail proves nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import Blockwise, llama, nn, rope
from oracle import checkpoint as checkpoint_
from oracle import llama as reference
from oracle.attention import Target, Verdict, allowed, judge
from oracle.attention import rmse as rmse_

# Several key blocks per row at these lengths, or the accumulator would never be rescaled.
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Subject:
    """A layer to compare, on its input: our configuration, and what torch says.

    config: sizes and RoPE; freqs instead of the RoPE's own where a file gives them. x: [B, T, D]. case:
    dtype -> the reference's `Case`. eager: run ours without jit (explicit loops compile slowly).
    """

    name: str
    config: llama.LlamaConfig
    x: np.ndarray
    case: Callable[[str], reference.Case]
    freqs: rope.Frequencies | None = None
    weights: Mapping[str, np.ndarray] | None = None
    eager: bool = False


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


def our_stages(subject: Subject, case: reference.Case, implementation) -> dict[str, np.ndarray]:
    """Every stage of jaxattn's layer, with the case's weights and inputs.

    Args: subject: sizes and RoPE. case: from the reference. implementation: as in `dot_product_attention`.
    Returns: stage -> array, heads as [B, T, N, H].
    Raises: ValueError where the weights do not fit the configuration.
    """
    weights = case.weights if subject.weights is None else subject.weights
    weights = {name: array.astype(case.x.dtype) for name, array in weights.items()}
    layer = llama.load_attention(subject.config, weights, freqs=subject.freqs, implementation=implementation)

    def run(layer, x, positions):
        return layer.stages(x, positions=positions, residual=True)

    run = run if subject.eager else nnx.jit(run)
    stages = run(layer, jnp.asarray(case.x), jnp.asarray(case.positions))
    return {name: np.asarray(value) for name, value in stages._asdict().items()}


def compare(subject: Subject, case: reference.Case, dtype: str, implementation) -> list[Row]:
    """The rows of one subject, dtype and implementation, in the order of the stages.

    Besides the stages there is "vs torch layer": the output against torch's in the same dtype. In
    float32 its largest error may be 2e-5 of the largest output, in other dtypes the sum of both sides'
    allowed errors.
    """
    ours = our_stages(subject, case, implementation)
    label = implementation if isinstance(implementation, str) else implementation.name
    verdicts = {stage: judge(stage, ours[stage], case.targets[stage]) for stage in reference.STAGES}
    verdicts["vs torch layer"] = _against_layer(ours["output"], case, dtype)
    return [Row(subject.name, label, dtype, stage, verdict) for stage, verdict in verdicts.items()]


def _against_layer(output: np.ndarray, case: reference.Case, dtype: str) -> Verdict:
    target = case.targets["output"]
    difference = np.asarray(output, np.float64) - np.asarray(case.plain_output, np.float64)
    rmse, max_abs = float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max())
    if dtype == "float32":
        bound = 2e-5 * float(np.abs(target.value).max())
        reason = "" if max_abs <= bound else f"max abs {max_abs / bound:.3g} times what float32 should reach"
    else:
        bound = target.bound + target.plain_rmse
        reason = "" if rmse <= bound else f"{rmse / bound:.3g} times the allowed error"
    return Verdict("vs torch layer", rmse, max_abs, bound, target.plain_rmse, reason)


def llama_subject(
    folder: str | Path, model, ids: np.ndarray, *, name: str, layer: int = 0, first_position: int = 0
) -> Subject:
    """A layer of a Llama checkpoint on tokens, its input being what the model feeds it.

    Configuration and weights are read from the folder by `jaxattn.llama`, so the reading is compared too.

    Args: folder: the checkpoint. model: Hugging Face's, of the same folder. ids: int [B, T]. layer: which.
      first_position: of each row.
    """
    x = reference.attention_input(model, ids, layer=layer)
    positions = first_position + np.arange(ids.shape[1])
    tensors, prefix = checkpoint_tensors(folder), f"model.layers.{layer}.self_attn."
    weights = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}

    def case(dtype):
        return reference.layer_case(model, x, dtype, layer=layer, positions=positions)

    return Subject(name, checkpoint_config(folder), x, case, weights=weights, eager=ids.size <= 16)


def checkpoint_tensors(folder: str | Path) -> Mapping[str, np.ndarray]:
    """The tensors of a checkpoint folder under Hugging Face's names, read one at a time where the form
    allows it: safetensors by `jaxattn.llama`, PyTorch's pickles and Meta's by `oracle.checkpoint`.
    """
    folder = Path(folder)
    if checkpoint_.is_meta(folder):
        return checkpoint_.Meta(folder)
    pickles = checkpoint_.pickles(folder)
    return checkpoint_.read_pickles(pickles) if pickles else llama.Safetensors(folder)


def checkpoint_config(folder: str | Path) -> llama.LlamaConfig:
    """The configuration of a checkpoint folder in any form that `checkpoint_tensors` reads."""
    if checkpoint_.is_meta(folder):
        return llama.LlamaConfig.from_hf(checkpoint_.Meta(folder).config)
    return llama.LlamaConfig.from_folder(folder)


def convert(source: str | Path, target: str | Path) -> Path:
    """Write a checkpoint as safetensors in our names, with its `config.json`, one tensor at a time.

    Both files are written whole beside their places and then moved there: an error leaves neither.

    Args: source: a folder in any form that `checkpoint_tensors` reads. target: a new or an empty folder.
    Returns: the path of the safetensors file.
    Raises: ValueError or FileNotFoundError that names what is wrong with the source; OSError where it cannot
    be written.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; convert writes into a new or an empty folder")
    tensors = checkpoint_tensors(source)
    if isinstance(tensors, checkpoint_.Meta):
        text, config = json.dumps(tensors.config, indent=1) + "\n", llama.LlamaConfig.from_hf(tensors.config)
    else:
        config = llama.LlamaConfig.from_folder(source)
        text = (source / "config.json").read_text(encoding="utf-8")
    made, staging, names = not target.exists(), target / f".convert.{os.getpid()}", ("model.safetensors", "config.json")
    try:
        llama.save_converted(staging, config, tensors)
        (staging / "config.json").write_text(text, encoding="utf-8")
        for name in names:
            (staging / name).replace(target / name)
        staging.rmdir()
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folder was empty: what is there is ours
            for name in names:
                (target / name).unlink(missing_ok=True)
            if made:
                target.rmdir()
        raise
    return target / "model.safetensors"


def compare_model(
    folder: str | Path, name: str, dtype: str, implementation, *, tokens: int = 24, new_tokens: int = 64
) -> list[Row]:
    """The whole model on a left-padded batch of two: logits at every position, then greedy generation.

    "logits": in float32 against Hugging Face's float32, the largest error at most 1e-4 of the largest logit;
    in other dtypes by the accuracy rule. "greedy tokens": in float32 the share of generated tokens that
    differ from those of Hugging Face's `generate` with its KV cache, which must be 0; in other dtypes the
    choice after each prompt token, where the two best logits lie further apart than twice the largest error.

    Args: folder: the checkpoint. dtype: "float32" or "bfloat16". tokens: T of the prompts. new_tokens: to
    generate.
    """
    import torch

    config = checkpoint_config(folder)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, tokens))
    padding = np.array([0, tokens // 4])
    real = np.arange(tokens) >= padding[:, None]
    model = llama.load(config, checkpoint_tensors(folder), implementation=implementation, param_dtype=jnp.dtype(dtype))
    cache = model.init_cache(2, tokens + 1, start=jnp.asarray(padding))
    ours, _ = nnx.jit(lambda model, ids, cache: model(ids, cache=cache))(model, jnp.asarray(ids), cache)
    ours = np.asarray(ours, np.float64)[real]

    def theirs(hf):
        """Each row alone and without padding: under it the float64 softmax of transformers gives NaN."""
        with torch.no_grad():
            rows = [hf(torch.from_numpy(row[None, start:])).logits[0] for row, start in zip(ids, padding, strict=True)]
        return torch.cat(rows).double().numpy()

    hf = checkpoint_.load_model(folder, dtype)
    near = theirs(hf)
    if dtype == "float32":
        difference = np.abs(ours - near)
        rmse, bound = float(np.sqrt(np.mean(difference**2))), 1e-4 * float(np.abs(near).max())
        reason = "" if difference.max() <= bound else f"max abs {difference.max() / bound:.3g} times the allowed error"
        logits = Verdict("logits", rmse, float(difference.max()), bound, 0.0, reason)
        chosen = nn.generate(model, jnp.asarray(ids), new_tokens, padding=jnp.asarray(padding))
        expected = hf.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        wrong = np.asarray(chosen) != expected[:, tokens:].numpy()
        first = f"; the first at step {int(np.argmax(wrong.any(0)))}" if wrong.any() else ""
    else:
        right = theirs(checkpoint_.load_model(folder, dtype).double())
        with torch.no_grad():
            head = hf.get_output_embeddings().weight.double().abs()
            hidden = torch.from_numpy(np.asarray(model.norm.scale[...], np.float64)).abs()
            size = (hidden @ head.T).numpy()
        plain_rmse = rmse_(near, right)
        target = Target(right, plain_rmse, allowed(plain_rmse, size, dtype))
        logits = judge("logits", ours, target)
        best = np.sort(right, -1)
        error = np.abs(near - right).max(-1)
        clear = best[:, -1] - best[:, -2] > 2 * np.maximum(error, np.quantile(error, 0.9))
        if not clear.any():
            raise ValueError("no position has a clear best token: the comparison of choices would prove nothing")
        wrong = (ours.argmax(-1) != right.argmax(-1))[clear]
        first = f" of {int(clear.sum())} clear choices"
    share = float(wrong.mean())
    reason = f"{int(wrong.sum())} tokens differ{first}" if wrong.any() else ""
    tokens_verdict = Verdict("greedy tokens", share, float(wrong.any()), 0.0, 0.0, reason)
    label = implementation if isinstance(implementation, str) else implementation.name
    return [Row(name, label, dtype, verdict.name, verdict) for verdict in (logits, tokens_verdict)]


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
    model, generator = StableLmForCausalLM(hf).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.model.layers[0].self_attn.named_parameters():
            peak = 5.0**0.5 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.normal_(generator=generator).mul_(peak * parameter.shape[1] ** -0.5)
    config = llama.LlamaConfig(64, 128, 64, 1, 4, 2, 32, rope.from_hf(hf.to_dict()))
    x = np.random.default_rng(seed).normal(size=(1, tokens, 128)).astype(np.float32)
    return Subject("stablelm (partial)", config, x, lambda dtype: reference.layer_case(model, x, dtype))


def file_subject(path: str | Path, *, tokens: int = 256, first_position: int = 0, seed: int = 0) -> Subject:
    """The layer in a file of `python -m oracle extract`, on normal random input; transformers is not needed.

    Args: path: of the file. tokens: T.
    Raises: ValueError where the file is no layer file.
    """
    tensors = checkpoint_.read_pickle(path)
    reference.WrittenOut(tensors)  # complete?
    freqs = rope.Frequencies(tuple(map(float, tensors["inv_freq"])), float(tensors["attention_scaling"]))
    H = 2 * len(freqs.inv_freq)
    rows, D = tensors["q_proj.weight"].shape
    biased = any(name.endswith(".bias") for name in tensors)
    config = llama.LlamaConfig(
        vocab_size=0,
        d_model=D,
        d_mlp=0,
        n_layers=1,
        n_heads=rows // H,
        n_kv_heads=tensors["k_proj.weight"].shape[0] // H,
        head_dim=H,
        rope=rope.RopeConfig(H),
        attention_bias=biased,
    )
    x = np.random.default_rng(seed).normal(size=(1, tokens, D)).astype(np.float32)
    positions = first_position + np.arange(tokens)
    return Subject(
        Path(path).name, config, x, lambda dtype: reference.file_case(tensors, x, dtype, positions=positions), freqs
    )


def implementation(name: str):
    """The implementation that parity compares under a name.

    Blockwise gets several key blocks to a row, Triton its interpreter where there is no GPU that runs it.
    """
    if name == "blockwise":
        return Blockwise(block_q=BLOCK, block_k=BLOCK)
    if name == "triton":
        from jaxattn.impl.triton import Triton

        return Triton(interpret=not kernels_run_here())
    return name


def kernels_run_here() -> bool:
    """Whether this device runs the Triton kernels natively; an older GPU does not."""
    from jaxattn import explain

    x = jax.ShapeDtypeStruct((1, 16, 1, 16), "float32")
    return "cannot run" not in next(line for line in explain(x, x, x).splitlines() if line.startswith("triton"))
