"""Cases are data: masks as text mean one thing in every framework, FLOPs and bytes follow from shapes."""

import dataclasses

import numpy as np
import pytest

from bench import adapters, cases
from bench.cases import Problem

SMALL = Problem("c", "jaxattn-naive", 2, 16, 16, 4, 2, 8, "causal", "float32", "cpu")
MASKS = (
    "full",
    "causal",
    "causal & window(3, 0)",
    "window(2, 2)",
    "causal & documents(3)",
    "~causal | window(1, -1)",
    "~(causal & window(3, 0)) & documents(2)",
)


def drawn(mask, T, S):
    return "\n".join("".join(".#"[int(x)] for x in row) for row in cases.allowed_rows(mask, np.arange(T), T, S))


def test_masks_by_hand():
    assert drawn("causal & window(1, 0)", 4, 4) == "#...\n##..\n.##.\n..##"
    assert drawn("causal & documents(2)", 4, 4) == "#...\n##..\n..#.\n..##"
    assert drawn("~causal", 3, 3) == ".##\n..#\n..."
    assert drawn("window(0, 1)", 2, 3) == "##.\n.##"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("T", "S"), [(16, 16), (7, 11)])
def test_a_mask_means_the_same_in_jaxattn_and_in_torch(mask, T, S):
    problem = dataclasses.replace(SMALL, mask=mask, queries=T, keys=S)
    expected = cases.allowed_rows(mask, np.arange(T), T, S)
    ours = np.broadcast_to(adapters._jaxattn_mask(problem).to_array(T, S), (1, 1, T, S))[0, 0]
    np.testing.assert_array_equal(ours, expected)
    in_graph = adapters._jax_allowed(problem)
    assert in_graph is None if mask == "full" else (np.asarray(in_graph) == expected).all()
    pytest.importorskip("torch")
    theirs = adapters._torch_allowed(problem)
    assert theirs is None if mask == "full" else (theirs.numpy() == expected).all()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("casual", "'casual' is not known"),
        ("window", "'window' takes arguments"),
        ("causal(1)", "'causal' takes no arguments"),
        ("window(1)", "wrong number of arguments"),
        ("window(1.5, 0)", "'1.5' is not an integer"),
        ("window(left=1, right=0)", "'window' takes arguments"),
        ("causal +", "not an expression"),
        ("causal + full", "'causal + full' is not known"),
        ("__import__('os')", "is not known"),
        ("causal.T", "is not known"),
    ],
)
def test_a_wrong_mask_is_explained_and_never_run(text, problem):
    with pytest.raises(ValueError, match=r"write e\.g\.") as caught:
        cases.allowed_rows(text, np.arange(2), 2, 2)
    assert problem in str(caught.value)


@pytest.mark.parametrize("mask", [*MASKS, "documents(5)", "causal & documents(3) & window(4, 2)", "window(-2, 5)"])
@pytest.mark.parametrize(("T", "S"), [(33, 33), (7, 40), (40, 7), (1, 9)])
def test_pairs_counts_what_is_allowed(mask, T, S):
    counted = cases.allowed_rows(mask, np.arange(T), T, S).sum()
    assert cases.pairs(mask, T, S) == (T * S / 2 if mask == "causal" and T == S else counted)


def test_causal_flops_are_half_of_full_ones():
    full = dataclasses.replace(SMALL, mask="full")
    assert full.flops() == 4 * 2 * 4 * 16 * 16 * 8
    assert SMALL.flops() == full.flops() / 2
    assert dataclasses.replace(SMALL, direction="both").flops() == 3.5 * SMALL.flops()


def test_a_layer_adds_its_projections():
    layer = dataclasses.replace(SMALL, layer=True)
    D, keys, tokens = 32, 16, 2 * 16
    assert layer.flops() - SMALL.flops() == 2 * tokens * (2 * D * D + 2 * keys * D)


def test_inputs_depend_on_seed_and_shape_only():
    one, two = (cases.inputs(dataclasses.replace(SMALL, implementation=name)) for name in ("torch-eager", "x:y"))
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(one[name], two[name])
    assert not np.array_equal(one["query"], cases.inputs(dataclasses.replace(SMALL, seed=1))["query"])


def test_sampled_rows_hold_the_first_and_the_last_and_no_row_twice():
    rows = cases.sampled_rows(dataclasses.replace(SMALL, queries=1000))
    assert rows[0] == 0
    assert rows[-1] == 999
    assert len(set(rows)) == 32


def test_every_case_names_implementations_that_exist():
    for case in cases.CASES.values():
        for name in case.implementations:
            adapters.find(name)
        for mask in case.masks:
            assert cases.allowed_rows(mask, np.arange(2), 8, 8).shape == (2, 8)


def test_the_cases_that_are_promised():
    llama = cases.CASES["llama-3.2-1b"]
    assert (llama.heads, llama.kv_heads, llama.head_dim, llama.lengths) == (32, 8, 64, (1024, 4096, 16384))
    assert set(llama.implementations) == {*cases.EVERY, *cases.LAYERS} == adapters.ADAPTERS.keys()
    speedup = cases.CASES["speedup"]
    assert (speedup.batch, speedup.heads, speedup.head_dim, speedup.dtype_gpu) == (1, 32, 128, "float16")
    assert (speedup.lengths[0], speedup.lengths[-1]) == (512, 8192)
    window = cases.CASES["window-64"]
    assert (window.heads, window.head_dim, window.lengths[0], window.lengths[-1]) == (8, 64, 128, 2048)
    assert cases.pairs(window.masks[1], 2048, 2048) == 2048 * 64 - 64 * 63 / 2


@pytest.mark.parametrize(
    ("shape", "problem"),
    [("1,2,3", "six integers"), ("1,8,8,3,2,4", "multiple of K=2"), ("1,0,8,2,2,4", "at least 1"), ("a", "six")],
)
def test_a_wrong_shape_is_explained(shape, problem):
    with pytest.raises(ValueError, match=problem):
        cases.custom(shape, "causal")


def test_an_unknown_implementation_is_answered_with_the_names():
    with pytest.raises(ValueError, match="known: jaxattn-naive, jaxattn-blockwise"):
        adapters.find("flash")
