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
from collections.abc import Callable, Iterable, Mapping
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
# The first that is there is read, as transformers does: two readers of different files would prove nothing.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


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
            f"{self.subject:<22} {self.implementation:<18} {self.dtype:<9} {self.stage:<16} "
            f"{v.max_abs:>9.2e} {v.rmse:>9.2e} {v.bound:>9.2e} {'ok' if v else 'FAIL: ' + v.reason}"
        )


_COLUMNS = ("subject", "implementation", "dtype", "stage", "max abs", "RMSE", "allowed")
HEADER = "{:<22} {:<18} {:<9} {:<16} {:>9} {:>9} {:>9} verdict".format(*_COLUMNS)


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
    allowed errors. Where the case was run on a second device too, "vs torch on it" is the same for that one.
    """
    ours = our_stages(subject, case, implementation)
    label = implementation if isinstance(implementation, str) else implementation.name
    target = case.targets["output"]
    verdicts = {stage: judge(stage, ours[stage], case.targets[stage]) for stage in reference.STAGES}
    near = {"vs torch layer": (case.plain_output, target.plain_rmse)}
    if case.second:
        output = case.second.stages["output"]
        near[f"vs torch on {case.second.device}"] = (
            output,
            target.bound,
        )  # not its own error, which would excuse itself
    for name, (output, plain_rmse) in near.items():
        verdicts[name] = _against(name, ours["output"], output, plain_rmse, target, dtype, 2e-5)
    return [Row(subject.name, label, dtype, stage, verdict) for stage, verdict in verdicts.items()]


def compare_devices(subject: Subject, case: reference.Case, dtype: str) -> list[Row]:
    """torch's own stages on the case's second device, judged as ours are: with TF32 on they would fail.

    Returns: no row where the case was run on one device.
    """
    if case.second is None:
        return []
    label = f"torch on {case.second.device}"
    verdicts = [judge(stage, case.second.stages[stage], case.targets[stage]) for stage in reference.STAGES]
    return [Row(subject.name, label, dtype, verdict.name, verdict) for verdict in verdicts]


def second_device(torch_has_cuda: bool, jax_platform: str) -> tuple[str | None, str]:
    """Where torch runs besides the CPU, and what the output says about it.

    Args: torch_has_cuda: `torch.cuda.is_available()`. jax_platform: of JAX's default device.
    Returns: ("cuda", a line) where both see a GPU, else (None, a line with the reason).

    >>> second_device(True, "gpu")
    ('cuda', 'torch on the CPU and on the GPU')
    """
    on_gpu = jax_platform in ("gpu", "cuda")
    if torch_has_cuda and on_gpu:
        return "cuda", "torch on the CPU and on the GPU"
    if on_gpu:
        return None, "torch on the CPU only: this torch sees no CUDA, so nothing is compared with torch on the GPU"
    if torch_has_cuda:
        return None, "torch on the CPU only: JAX sees no GPU (install jaxattn[cuda]) to be compared with torch there"
    return None, "torch on the CPU"


def _against(name, ours, theirs, plain_rmse: float, target: Target, dtype: str, share: float) -> Verdict:
    """Ours against torch's in the same dtype; in float32 to a share of the largest entry, else both sides' errors."""
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    rmse, max_abs = float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max())
    if dtype == "float32":
        bound = share * float(np.abs(target.value).max())
        reason = "" if max_abs <= bound else f"max abs {max_abs / bound:.3g} times what float32 should reach"
    else:
        bound = target.bound + plain_rmse
        reason = "" if rmse <= bound else f"{rmse / bound:.3g} times the allowed error"
    return Verdict(name, rmse, max_abs, bound, plain_rmse, reason)


def llama_subject(
    folder: str | Path,
    model,
    ids: np.ndarray,
    *,
    name: str,
    layer: int = 0,
    first_position: int = 0,
    device: str | None = None,
) -> Subject:
    """A layer of a Llama checkpoint on tokens, its input being what the model feeds it.

    Configuration and weights are read from the folder by `jaxattn.llama`, so the reading is compared too.

    Args: folder: the checkpoint. model: Hugging Face's, of the same folder. ids: int [B, T]. layer: which.
      first_position: of each row. device: on which torch's layer is run too, besides the CPU.
    """
    x = reference.attention_input(model, ids, layer=layer)
    positions = first_position + np.arange(ids.shape[1])
    tensors, prefix = checkpoint_tensors(folder), f"model.layers.{layer}.self_attn."
    weights = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}

    def case(dtype):
        return reference.layer_case(model, x, dtype, layer=layer, positions=positions, device=device)

    return Subject(name, checkpoint_config(folder), x, case, weights=weights, eager=ids.size <= 16)


def checkpoint_tensors(folder: str | Path) -> Mapping[str, np.ndarray]:
    """The tensors of a checkpoint folder under Hugging Face's names, read one at a time where the form
    allows it: safetensors by `jaxattn.llama`, PyTorch's pickles and Meta's by `oracle.checkpoint`.

    Raises: ValueError or FileNotFoundError for broken or missing files, and for a converted checkpoint.
    """
    folder = Path(folder)
    if checkpoint_.is_meta(folder):
        return checkpoint_.Meta(folder)
    there = [name for name in _WEIGHTS if (folder / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(_WEIGHTS)}")
    if there[0] == "pytorch_model.bin":
        return checkpoint_.read_pickle(folder / there[0])
    if there[0] == "pytorch_model.bin.index.json":
        return _read_indexed_pickles(folder / there[0])
    tensors = llama.Safetensors(folder)
    if "embedding" in tensors:
        raise ValueError(f"{folder} holds jaxattn's own names, which torch cannot read: give what it was made from")
    return tensors


def _read_indexed_pickles(index: Path) -> checkpoint_.Pickle:
    shards: dict[Path, checkpoint_.Pickle] = {}

    def names_in(path: Path) -> Iterable[str]:
        shards[path] = checkpoint_.read_pickle(path)
        return shards[path]

    llama.read_index(index, ".bin", names_in)
    return checkpoint_.Pickle.joined(shards.values())


def check(folder: str | Path) -> None:
    """Look at a whole checkpoint before anything is done with it, so that a broken file gives one error.

    transformers would follow an index out of the folder, cast integers to numbers, and go on with NaN.

    Args: folder: in any form that `checkpoint_tensors` reads.
    Raises: ValueError or FileNotFoundError that names what is wrong.
    """
    llama.check_checkpoint(checkpoint_config(folder), checkpoint_tensors(folder))


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
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    staging, names = target / f".convert.{os.getpid()}", ("model.safetensors", "config.json")
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
            for folder in made:
                folder.rmdir()
        raise
    return target / "model.safetensors"


def compare_model(
    folder: str | Path,
    name: str,
    dtype: str,
    implementation,
    *,
    tokens: int = 24,
    new_tokens: int = 64,
    device: str | None = None,
) -> list[Row]:
    """The whole model on a left-padded batch of two: logits at every position, then greedy generation.

    "logits": in float32 against Hugging Face's float32, the largest error at most 1e-4 of the largest logit;
    in other dtypes by the accuracy rule. "greedy tokens": in float32 the share of generated tokens that
    differ from those of Hugging Face's `generate` with its KV cache, which must be 0; in other dtypes the
    same where the two best logits lie further apart than twice the largest error of Hugging Face's own in that step
    and in nine steps of ten, each token being chosen after those that Hugging Face chose, for one near tie would
    change all that follows.

    Args: folder: the checkpoint. dtype: "float32" or "bfloat16". tokens: T of the prompts. new_tokens: to
    generate. device: as in `llama_subject`, for the logits.
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
    hf = checkpoint_.load_model(folder, dtype)
    expected = reference.greedy(hf, ids, new_tokens, real)
    prompts = [row[start:] for row, start in zip(ids, padding, strict=True)]
    near = np.concatenate(reference.logits(hf, prompts))
    if dtype == "float32":
        target, plain_rmse = Target(near, 0.0, 0.0), 0.0
        logits = _against("logits", ours, near, plain_rmse, target, dtype, 1e-4)
        chosen = nn.generate(model, jnp.asarray(ids), new_tokens, padding=jnp.asarray(padding))
        wrong = np.asarray(chosen) != expected
        first = f"; the first at step {int(np.argmax(wrong.any(0)))}" if wrong.any() else ""
    else:
        exact = checkpoint_.load_model(folder, dtype).double()
        right = np.concatenate(reference.logits(exact, prompts))
        with torch.no_grad():
            head = hf.get_output_embeddings().weight.double().abs()
            hidden = torch.from_numpy(np.asarray(model.norm.scale[...], np.float64)).abs()
            size = (hidden @ head.T).numpy()
        plain_rmse = rmse_(near, right)
        target = Target(right, plain_rmse, allowed(plain_rmse, size, dtype))
        logits = judge("logits", ours, target)
        rows = [np.concatenate([row, more[:-1]]) for row, more in zip(prompts, expected, strict=True)]
        steps, near_steps = (np.stack([x[-new_tokens:] for x in reference.logits(m, rows)]) for m in (exact, hf))
        best, error = np.sort(steps, -1), np.abs(near_steps - steps).max(-1)
        # A step whose error happens to be small in torch need not be so lucky here.
        clear = best[..., -1] - best[..., -2] > 2 * np.maximum(error, np.quantile(error, 0.9))
        if not clear.any():
            raise ValueError("no step has a clear best token: the comparison of choices would prove nothing")
        wrong = (_choices(model, ids, padding, expected) != expected)[clear]
        first = f" of {int(clear.sum())} clear choices"
    share = float(wrong.mean())
    reason = f"{int(wrong.sum())} tokens differ{first}" if wrong.any() else ""
    verdicts = [logits, Verdict("greedy tokens", share, float(wrong.any()), 0.0, 0.0, reason)]
    if device is not None:
        there = np.concatenate(reference.logits(hf.to(device), prompts))
        here = f"vs torch on {device}"
        verdicts.insert(1, _against(here, ours, there, target.bound, target, dtype, 1e-4))
    label = implementation if isinstance(implementation, str) else implementation.name
    return [Row(name, label, dtype, verdict.name, verdict) for verdict in verdicts]


def _choices(model: nn.Transformer, ids: np.ndarray, padding: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The token that the model would choose after the prompts [B, T] and each of `taken` [B, steps], from its cache."""
    cache = model.init_cache(len(ids), ids.shape[1] + taken.shape[1], start=jnp.asarray(padding))
    given, chosen = jnp.asarray(ids), []
    for step in range(taken.shape[1]):
        choice, cache = nn.advance(model, given, cache)
        chosen.append(np.asarray(choice))
        given = jnp.asarray(taken[:, step : step + 1])
    return np.concatenate(chosen, 1)


def partial_subject(*, tokens: int = 64, seed: int = 0, device: str | None = None) -> Subject:
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
    return Subject("stablelm (partial)", config, x, lambda dtype: reference.layer_case(model, x, dtype, device=device))


def file_subject(
    path: str | Path, *, tokens: int = 256, first_position: int = 0, seed: int = 0, device: str | None = None
) -> Subject:
    """The layer in a file of `python -m oracle extract`, on normal random input; transformers is not needed.

    Args: path: of the file. tokens: T. device: as in `llama_subject`.
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

    def case(dtype):
        return reference.file_case(tensors, x, dtype, positions=positions, device=device)

    return Subject(Path(path).name, config, x, case, freqs)


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
