"""`python -m bench conformance`: the meaning of every argument, tried on this library and on its peers.

Design fact: all are judged on the same cases by the same rule, RMSE against float64 at most twice that of plain torch;
what a library refuses counts as refused, never as wrong. Rows with nothing to attend and NaN in keys that nothing may
attend are asked apart, so that a library with another convention there can still pass everything else.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.conformance_cases import Case, Inputs, cover, inputs


class Refused(Exception):
    """A library's own word that it does not compute a case."""


def quick_to_compile(dtype) -> dict[str, int | bool]:
    """Compiler options for hundreds of programs that run once or twice each: what counts is the time to compile them.

    Level 0 in 16 bits, else 1: at 0 sums are not split over vector lanes, and their float32 errors are larger.

    >>> quick_to_compile("float32")["xla_backend_optimization_level"]
    1
    """
    import jax

    chosen = {}
    for option in (
        {"xla_backend_optimization_level": int(np.dtype(dtype).itemsize > 2)},
        {"xla_llvm_disable_expensive_passes": True},
        {"xla_cpu_parallel_codegen_split_count": 1},
        {"xla_cpu_use_fusion_emitters": False},
    ):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # options come and go with versions of XLA
            jax.jit(lambda x: x, compiler_options=option)(0.0)
            chosen |= option
    return chosen


def compute_jax(attend: Callable, x: Inputs, runs: int = 1) -> list[dict[str, Any]]:
    """Results by name ("out", "lse", "dq", "dk", "dv", "dbias") of a function of JAX arrays, once for each run.

    Args:
      attend: (q, k, v, bias, **x.arguments) -> (out, lse).
      x: the case's arrays.
      runs: how often the compiled function runs.
    """
    import jax

    from jaxattn import Mask

    traced = {name: a for name, a in x.arguments.items() if isinstance(a, (np.ndarray, Mask))}
    static = {name: a for name, a in x.arguments.items() if name not in traced}

    @functools.partial(jax.jit, compiler_options=_compiler_options(x.q.dtype))
    def run(q, k, v, bias, traced, d_out, d_lse):
        (out, lse), pull = jax.vjp(lambda *operands: attend(*operands, **traced, **static), q, k, v, bias)
        gradients = pull((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))
        return dict(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *gradients), strict=True))

    with jax.enable_x64() if x.q.dtype == np.float64 else contextlib.nullcontext():
        arrays = (x.q, x.k, x.v, x.bias, traced, x.d_out, x.d_lse)  # NumPy's: jnp.asarray compiles for each shape
        return [jax.tree.map(np.asarray, run(*arrays)) for _ in range(runs)]


_compiler_options = functools.cache(quick_to_compile)


def jaxattn(implementation) -> Callable[[Inputs], dict[str, Any]]:
    """This library, with a name or an implementation object."""

    def run(x: Inputs) -> dict[str, Any]:
        from jaxattn import dot_product_attention

        def attend(q, k, v, bias, **arguments):
            return dot_product_attention(
                q, k, v, bias, scale=x.scale, logits_soft_cap=x.soft_cap, implementation=implementation,
                return_residual=True, **arguments,
            )  # fmt: skip

        try:
            return compute_jax(attend, x)[0]
        except NotImplementedError as error:
            raise Refused(str(error).partition(": ")[2]) from None

    return run


def jax_nn(x: Inputs) -> dict[str, Any]:
    """`jax.nn.dot_product_attention`, its arguments as they are, a mask object as an array."""
    import jax

    from jaxattn import Mask

    if x.soft_cap is not None:
        raise Refused("no soft cap")
    if x.v.shape[-1] != x.k.shape[-1]:
        raise Refused("the value's head dim must be the key's")
    arguments = dict(x.arguments)
    mask = arguments.get("mask")
    if isinstance(mask, Mask):
        mask = np.asarray(mask.to_array(x.q.shape[1], x.k.shape[1]))
    if mask is not None:
        arguments["mask"] = np.broadcast_to(mask, (1,) * (4 - mask.ndim) + mask.shape)

    def attend(q, k, v, bias, **arguments):
        return jax.nn.dot_product_attention(
            q, k, v, bias, scale=x.scale, return_residual=True, implementation="xla", **arguments
        )

    return compute_jax(attend, dataclasses.replace(x, arguments=arguments))[0]


def _torch(x: Inputs, attend: Callable, gradients: bool) -> dict[str, Any]:
    """Results of a function of torch tensors (q, k, v, bias, allowed), all [B, N or K, T or S, ...]."""
    import torch

    from oracle.attention import to_numpy, to_torch

    q, k, v, d_out = (to_torch(a.swapaxes(1, 2)) for a in (x.q, x.k, x.v, x.d_out))
    bias = None if x.bias is None else to_torch(x.bias)
    leaves = [a.requires_grad_(gradients) for a in (q, k, v, bias) if a is not None]
    out, lse = attend(q, k, v, bias, to_torch(x.allowed))
    results = {"out": to_numpy(out).swapaxes(1, 2)}
    if lse is not None:
        results["lse"] = to_numpy(lse).swapaxes(1, 2)
    if gradients:
        grads = [to_numpy(a) for a in torch.autograd.grad(out, leaves, d_out)]
        results |= dict(zip(("dq", "dk", "dv"), (a.swapaxes(1, 2) for a in grads[:3]), strict=True))
        if bias is not None:
            results["dbias"] = grads[3]
    return results


def torch_sdpa(x: Inputs) -> dict[str, Any]:
    """`torch.nn.functional.scaled_dot_product_attention`; it has no soft cap and returns no log-sum-exp."""
    import torch

    if x.soft_cap is not None:
        raise Refused("no soft cap")

    def attend(q, k, v, bias, allowed):
        mask = allowed if bias is None else torch.where(allowed, bias, -torch.inf)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(q, k, v, attn_mask=mask, scale=x.scale, enable_gqa=True), None

    return _torch(x, attend, gradients=True)


def torch_flex(x: Inputs) -> dict[str, Any]:
    """`torch.nn.attention.flex_attention`, not compiled; without a GPU it has no gradients."""
    import torch
    from torch.nn.attention import flex_attention

    gpu = torch.cuda.is_available()

    def attend(q, k, v, bias, allowed):
        B, N, T, S = allowed.shape
        whole = None if bias is None else bias.expand(B, N, T, S)

        def score_mod(score, b, n, t, s):
            if x.soft_cap is not None:
                score = x.soft_cap * torch.tanh(score / x.soft_cap)
            return score if whole is None else score + whole[b, n, t, s]

        mask = flex_attention.create_block_mask(lambda b, n, t, s: allowed[b, n, t, s], B, N, T, S, device=q.device)
        return flex_attention.flex_attention(
            q, k, v, score_mod, mask, scale=x.scale, enable_gqa=True, return_lse=True
        )  # fmt: skip

    return _torch(x, attend, gradients=gpu)


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation under test. `needs`: the package that it comes from."""

    run: Callable[[Inputs], dict[str, Any]]
    needs: str
    ours: bool = False


PEERS = {
    "jaxattn naive": Peer(jaxattn("naive"), "jax", ours=True),
    "jaxattn blockwise": Peer(jaxattn("blockwise"), "jax", ours=True),
    "jaxattn triton": Peer(jaxattn("triton"), "jax", ours=True),
    "jax.nn xla": Peer(jax_nn, "jax"),
    "torch SDPA": Peer(torch_sdpa, "torch"),
    "torch Flex": Peer(torch_flex, "torch"),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one implementation did with one case: "right", "wrong" or "refused", and why."""

    verdict: str
    reason: str = ""


def without_empty_rows(x: Inputs) -> Inputs:
    """The case with cotangents of 0 where a row may attend nothing: what happens there is asked apart."""
    allowed = x.allowed if x.bias is None else x.allowed & (x.bias != -np.inf)
    empty = ~allowed.any(-1).swapaxes(1, 2)
    return dataclasses.replace(x, d_out=np.where(empty[..., None], 0, x.d_out), d_lse=np.where(empty, 0, x.d_lse))


def judge(results: dict[str, Any], x: Inputs, targets: dict[str, Any]) -> Outcome:
    """The accuracy rule, on the rows that may attend something."""
    from oracle.attention import check

    results = {name: np.array(result) for name, result in results.items() if result is not None}
    empty = np.isneginf(targets["lse"].value)
    for name in ("out", "lse", "dq"):
        if name in results:
            results[name][empty] = targets[name].value[empty]
    failed = [f"{v.name}: {v.reason}" for v in check(results, targets).values() if not v]
    return Outcome("wrong", "; ".join(failed)) if failed else Outcome("right")


def attempt(peer: Peer, x: Inputs, targets: dict[str, Any]) -> Outcome:
    """Run one implementation on one case and judge it; a peer's exception is its refusal, one of ours is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = peer.run(x)
    except Refused as error:
        return Outcome("refused", str(error))
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0][:100]
        return Outcome("wrong" if peer.ours else "refused", f"{type(error).__name__}: {text}")
    return judge(results, x, targets)


def targets_of(x: Inputs, lse_cotangent: bool) -> dict[str, Any]:
    """The float64 targets of a case, with or without a cotangent of the log-sum-exp."""
    from oracle.attention import accuracy_bound

    return accuracy_bound(
        x.q, x.k, x.v, x.bias, x.allowed, scale=x.scale, logits_soft_cap=x.soft_cap, cotangent=x.d_out,
        lse_cotangent=x.d_lse if lse_cotangent else None,
    )  # fmt: skip


def probe(peer: Peer) -> tuple[str, str, str]:
    """What a row with nothing to attend gives, whether its gradients are 0, and whether NaN leaks from masked keys."""
    case = Case("", "none", "float32", (6, 8), (2, 1), 16, None, "plain")
    x = inputs(case)
    allowed = np.ones((2, 2, 6, 8), bool)
    allowed[..., 5:] = False
    whole = dataclasses.replace(x, arguments={"mask": allowed}, allowed=allowed)
    holes = x.k.copy(), x.v.copy()
    for array in holes:
        array[:, 5:] = np.nan
    rows = allowed.copy()
    rows[:, :, 2] = False
    try:
        leak = peer.run(dataclasses.replace(whole, k=holes[0], v=holes[1]))
        empty = peer.run(dataclasses.replace(x, arguments={"mask": rows}, allowed=rows))
    except Exception as error:
        return (f"refused: {str(error).strip().splitlines()[0][:60]}",) * 3

    def say(array) -> str:
        if np.isnan(array).any():
            return "NaN"
        return "0" if (array == 0).all() else "an average"

    gradient = "none" if "dq" not in empty else {"0": "0", "NaN": "NaN"}.get(say(empty["dq"][:, 2]), "not 0")
    leaks = any(np.isnan(np.asarray(result)).any() for result in leak.values() if result is not None)
    return say(np.asarray(empty["out"][:, 2])), gradient, "leaks" if leaks else "stays out"


def main(argv: list[str]) -> int:
    """Try every implementation on every case and print who passes what; 1 where one of ours is wrong."""
    parser = argparse.ArgumentParser("python -m bench conformance", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="one case in twenty-four, lengths up to 256")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"of {', '.join(PEERS)}; may be repeated")
    options = parser.parse_args(argv)
    unknown = set(options.only or ()) - set(PEERS)
    if unknown:
        parser.error(f"--only {sorted(unknown)}: must be of {', '.join(PEERS)}")
    peers = {name: peer for name, peer in PEERS.items() if not options.only or name in options.only}
    missing = [name for name, peer in peers.items() if importlib.util.find_spec(peer.needs) is None]
    peers = {name: peer for name, peer in peers.items() if name not in missing}
    cases = cover(("",))
    if options.quick:
        cases = [case for case in cases if max(case.lengths) <= 256][::24]

    outcomes, done = run_all(peers, cases)
    print_report(peers, outcomes, cases[:done], missing)
    return int(any(o.verdict == "wrong" for name in peers if peers[name].ours for o in outcomes[name].values()))


def run_all(peers: dict[str, Peer], cases: list[Case]) -> tuple[dict[str, dict[Case, Outcome]], int]:
    """Outcomes by implementation and case, and how many cases were finished; Ctrl-C ends early and keeps them."""
    from rich.progress import track

    outcomes: dict[str, dict[Case, Outcome]] = {name: {} for name in peers}
    refusing = {name: _refuses_all(peer) for name, peer in peers.items()}
    done = 0
    with contextlib.suppress(KeyboardInterrupt):
        for case in track(cases, "cases"):
            x = without_empty_rows(inputs(case))
            targets = {lse: targets_of(x, lse) for lse in (True, False)}
            for name, peer in peers.items():
                outcomes[name][case] = refusing[name] or attempt(peer, asked(peer, x), targets[peer.ours])
            done += 1
    return outcomes, done


def asked(peer: Peer, x: Inputs) -> Inputs:
    """The case as it is put to an implementation: only ours are asked for gradients through the log-sum-exp."""
    return x if peer.ours else dataclasses.replace(x, d_lse=np.zeros_like(x.d_lse))


def _refuses_all(peer: Peer) -> Outcome | None:
    """The refusal of the plainest case, which says that this machine does not run the implementation at all."""
    x = inputs(Case("", "none", "float32", (16, 16), (2, 2), 64, None, "plain"))
    outcome = attempt(peer, asked(peer, x), targets_of(x, peer.ours))
    return outcome if outcome.verdict == "refused" else None


def print_report(peers, outcomes, cases: list[Case], missing: list[str]) -> None:
    """Print who passes what: by mask, by logits, by dtype; then the conventions; then what was wrong or refused."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(100, 34 + 16 * len(peers)))
    table = Table(title=f"right / judged, of {len(cases)} cases; a case that is refused is not judged")
    table.add_column("")
    for name in peers:
        table.add_column(name, justify="right")

    def row(label: str, chosen: list[Case]) -> None:
        cells = []
        for name in peers:
            verdicts = [outcomes[name][case].verdict for case in chosen]
            judged = len(verdicts) - verdicts.count("refused")
            cells.append(f"{verdicts.count('right')}/{judged}" if judged else "refused")
        table.add_row(label, *cells)

    for axis in ("mask", "logits", "dtype"):
        for value in dict.fromkeys(getattr(case, axis) for case in cases):
            row(value, [case for case in cases if getattr(case, axis) == value])
        table.add_section()
    row("all", cases)
    table.add_section()
    probes = [probe(peer) for peer in peers.values()]
    for label, answers in zip(
        ("row with nothing to attend: output", "  its gradient", "NaN in keys that nothing may attend"),
        zip(*probes, strict=True),
        strict=True,
    ):
        table.add_row(label, *(answer.partition(":")[0] for answer in answers))
    console.print(table)
    for name in missing:
        console.print(f"{name}: not tried, {PEERS[name].needs} is not installed", highlight=False)
    for name in peers:
        refusals = collections.Counter(o.reason for o in outcomes[name].values() if o.verdict == "refused")
        for reason, count in refusals.most_common(4):
            console.print(f"{name}: refused {count}: {reason}", highlight=False, markup=False)
        wrong = [(case, o) for case, o in outcomes[name].items() if o.verdict == "wrong"]
        for case, outcome in wrong[:4]:
            console.print(f"{name}: wrong{case}: {outcome.reason}", highlight=False, markup=False)
        if len(wrong) > 4:
            console.print(f"{name}: and {len(wrong) - 4} more wrong", highlight=False)
