"""`python -m bench masks`: a picture of every pattern, its tiles, and what skipping the empty ones saves.

Design fact: drawn from what the library itself uses, `mask.to_array` for the pairs and `tile_codes` for the tiles.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import jaxattn
from jaxattn import Blocks, Causal, Mask, Window
from jaxattn.tiles import tile_codes

EMPTY_COLOUR, PARTIAL_COLOUR, FULL_COLOUR, PAIR_COLOUR = "#ffffff", "#f3d9a4", "#7fa8d1", "#1b2a41"


def patterns(T: int, block: int) -> dict[str, Mask]:
    """The published patterns at T tokens, their widths in proportion to the block.

    >>> len(patterns(64, 8))
    12
    """
    return {
        "causal": Causal(),
        "sliding_window": jaxattn.sliding_window(2 * block),
        "attention_sinks": jaxattn.attention_sinks(2 * block, sinks=2),
        "dilated": jaxattn.dilated(4, 3),
        "strided": jaxattn.strided(block),
        "longformer": jaxattn.longformer(2 * block, tokens=(0, T // 2)),
        "longformer, dilated": jaxattn.longformer(8, tokens=1, dilation=3),
        "bigbird": jaxattn.bigbird(T, block, global_blocks=1, random_blocks=1),
        "prefix_lm": jaxattn.prefix_lm(T // 3),
        "document_causal": jaxattn.document_causal(
            np.searchsorted([T // 4, T // 3, 3 * T // 4], np.arange(T), "right")
        ),
        "chunked": jaxattn.chunked(2 * block),
        "blocks of a window": Blocks(Window(1, 1), block),
    }


def draw(T: int, block: int, path: Path) -> None:
    """Draw every pattern at T tokens with tiles of block x block, and save the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    masks = patterns(T, block)
    columns = 4
    figure, axes = plt.subplots(-(-len(masks) // columns), columns, figsize=(11, 9.2), layout="constrained")
    for ax, (name, mask) in zip(axes.flat, masks.items(), strict=True):
        tiles = np.kron(np.asarray(tile_codes(mask, T, T, block, block))[0, 0], np.ones((block, block), np.int8))[
            :T, :T
        ]
        pixels = np.where(np.asarray(mask.to_array(T, T)).reshape(-1, T, T)[0] & (tiles == 1), 3, tiles)
        colours = ListedColormap([EMPTY_COLOUR, PARTIAL_COLOUR, FULL_COLOUR, PAIR_COLOUR])
        ax.imshow(pixels, cmap=colours, vmin=0, vmax=3, interpolation="nearest", extent=(0, T, T, 0))
        ax.set_xticks(range(0, T + 1, block))
        ax.set_yticks(range(0, T + 1, block))
        ax.grid(color="#999999", linewidth=0.4)
        ax.tick_params(length=0, labelbottom=False, labelleft=False)
        saved = mask.stats(T, T, block)["flops_saved"]
        ax.set_title(f"{name}\n{saved:.0%} of tiles skipped", fontsize=10)
    figure.supxlabel(f"key s, 0 to {T - 1}, in tiles of {block}")
    figure.supylabel(f"query t, 0 to {T - 1}, downwards")
    kinds = {
        "empty tile, not visited": EMPTY_COLOUR,
        "full tile, not masked": FULL_COLOUR,
        "partial tile, a pair not allowed": PARTIAL_COLOUR,
        "partial tile, an allowed pair": PAIR_COLOUR,
    }
    handles = [Patch(facecolor=colour, edgecolor="#999999", label=label) for label, colour in kinds.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(kinds), frameon=False, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> int:
    """Draw every pattern, and print what its tiles are at a length of one's own."""
    parser = argparse.ArgumentParser("python -m bench masks", description=main.__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens, for the table (default 4096)")
    parser.add_argument("--block", type=int, default=128, help="tokens a side of a tile, for the table (default 128)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/runs/masks.png"), help="where the picture goes")
    options = parser.parse_args(argv)
    if not 1 <= options.block <= options.length:
        parser.error(f"--block {options.block} must be at least 1 and at most --length {options.length}")

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tiles of {options.block} x {options.block}, {options.length} tokens")
    for column in ("pattern", "empty", "partial", "full", "pairs allowed", "FLOPs saved"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    for name, mask in patterns(options.length, options.block).items():
        stats = mask.stats(options.length, options.length, options.block)
        counts = (str(stats[kind]) for kind in ("empty", "partial", "full"))
        table.add_row(name, *counts, f"{stats['density']:.2%}", f"{stats['flops_saved']:.1%}")
    console = Console()
    console.print(table)
    draw(64, 8, options.out)
    console.print(f"picture: {options.out}")
    return 0
