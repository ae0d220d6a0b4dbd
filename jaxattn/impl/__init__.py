"""One file per implementation; they share `base`, the tile plan and the online softmax, and never import each other."""
