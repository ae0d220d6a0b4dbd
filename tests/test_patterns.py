"""Published patterns against the sets their papers define, written out pair by pair."""

import numpy as np
import pytest

from jaxattn import (
    Causal,
    attention_sinks,
    bigbird,
    chunked,
    dilated,
    document_causal,
    longformer,
    prefix_lm,
    sliding_window,
    strided,
)

DOCUMENTS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5])


@pytest.mark.parametrize(
    ("mask", "formula"),
    [
        (sliding_window(1), lambda t, s: s == t),
        (sliding_window(4), lambda t, s: s in range(t - 3, t + 1)),
        (attention_sinks(3, sinks=2), lambda t, s: s <= t and (s < 2 or s > t - 3)),
        (dilated(2, 3), lambda t, s: s in [t + 3 * i for i in (-2, -1, 0, 1, 2)]),
        (dilated(2, 1), lambda t, s: abs(t - s) <= 2),
        (strided(4), lambda t, s: max(0, t - 4) <= s <= t or (s <= t and (t - s) % 4 == 0)),
        (longformer(4, tokens=(3, 9)), lambda t, s: abs(t - s) <= 2 or bool({t, s} & {3, 9})),
        (longformer(4, 1, dilation=2), lambda t, s: t - s in (-4, -2, 0, 2, 4) or t == 0 or s == 0),
        (longformer(4, 1) & Causal(), lambda t, s: s <= t and (t - s <= 2 or s == 0)),
        (prefix_lm(5), lambda t, s: s < 5 or s <= t),
        (document_causal(DOCUMENTS), lambda t, s: s <= t and DOCUMENTS[t] == DOCUMENTS[s]),
        (chunked(4), lambda t, s: s <= t and t // 4 == s // 4),
    ],
    ids=lambda x: "" if callable(x) else str(x)[:60],
)
def test_pattern_is_the_set_of_its_paper(mask, formula):
    T = len(DOCUMENTS)
    np.testing.assert_array_equal(mask.to_array(T, T), [[bool(formula(t, s)) for s in range(T)] for t in range(T)])


def test_bigbird_is_a_window_of_blocks_global_blocks_and_random_blocks():
    T, block = 60, 4
    allowed = bigbird(T, block, window=5, global_blocks=1, random_blocks=2).to_array(T, T)
    blocks = allowed.reshape(15, block, 15, block)
    assert (blocks.any((1, 3)) == blocks.all((1, 3))).all()
    blocks = blocks.any((1, 3))
    i, j = np.ogrid[:15, :15]
    known = (abs(i - j) <= 2) | (i == 0) | (j == 0)
    assert blocks[known].all()
    random = (blocks & ~known).sum(1)
    assert random.max() <= 2
    assert 10 <= random.sum() <= 28  # 28 draws, of which some fall on blocks already seen


def test_bigbird_draws_differ_by_seed_and_repeat_with_it():
    arrays = [bigbird(256, 8, seed=seed).to_array(256, 256) for seed in (0, 1, 0)]
    assert (arrays[0] != arrays[1]).any()
    np.testing.assert_array_equal(arrays[0], arrays[2])


def test_prefix_differs_per_batch_element():
    allowed = prefix_lm(np.array([0, 3])).to_array(4, 4)
    np.testing.assert_array_equal(allowed[0, 0], Causal().to_array(4, 4))
    np.testing.assert_array_equal(allowed[1, 0], prefix_lm(3).to_array(4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sliding_window(0), "sliding_window size=0 must be an int from 1"),
        (lambda: sliding_window(1.5), "sliding_window size=1.5 must be an int from 1"),
        (lambda: attention_sinks(0), "attention_sinks size=0 must be an int from 1"),
        (lambda: attention_sinks(4, sinks=-1), "attention_sinks sinks=-1 must be an int from 0"),
        (lambda: dilated(-1, 2), "dilated window=-1 must be an int from 0"),
        (lambda: dilated(2, 0), "dilated dilation=0 must be an int from 1"),
        (lambda: strided(-3), "strided stride=-3 must be an int from 1"),
        (lambda: longformer(-2, 1), "longformer window=-2 must be an int from 0"),
        (lambda: longformer(4, -1), "Global tokens=-1 must be an int from 0"),
        (lambda: longformer(4, 1, dilation=0), "longformer dilation=0 must be an int from 1"),
        (lambda: bigbird(0, 8), "bigbird length=0 must be an int from 1"),
        (lambda: bigbird(64, 0), "bigbird block=0 must be an int from 1"),
        (lambda: bigbird(64, 8, window=2), "bigbird window=2 must be odd"),
        (lambda: bigbird(64, 8, window=-1), "bigbird window=-1 must be an int from 1"),
        (lambda: bigbird(64, 8, global_blocks=-1), "bigbird global_blocks=-1 must be an int from 0"),
        (lambda: bigbird(64, 8, random_blocks=-1), "bigbird random_blocks=-1 must be an int from 0"),
        (lambda: chunked(0), "chunked size=0 must be an int from 1"),
        (lambda: prefix_lm(-1), "prefix_lm prefix=-1 must be an int from 0"),
        (lambda: prefix_lm(1.5), "prefix_lm prefix=1.5 must be an int from 0"),
        (lambda: document_causal(np.zeros(3)), "SegmentIds query must be an integer array"),
    ],
)
def test_wrong_arguments_say_what_would_be_right(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_every_pattern_is_drawn_and_counted(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from bench import masks

    picture = tmp_path / "masks.png"
    assert masks.main(["--length", "64", "--block", "8", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for name, mask in masks.patterns(64, 8).items():
        stats = mask.stats(64, 64, 8)
        row = next(line for line in printed.splitlines() if f" {name} " in line)
        assert [int(x) for x in row.split("│")[2:5]] == [stats[kind] for kind in ("empty", "partial", "full")]
    with pytest.raises(SystemExit):
        masks.main(["--length", "4", "--block", "8"])
    assert "--block 8 must be at least 1 and at most --length 4" in capsys.readouterr().err
