"""What a layer can be brought to by factors and outliers, counted rank by rank."""

import math

import numpy as np


def reference(weight, gram, width, outliers=0.01):
    """(rank, bytes, bound on the error) while that is smaller than the layer, then the layer."""
    rows, columns = weight.shape
    scaled = np.array(
        [[weight[i, j] * math.sqrt(gram[j, j]) for j in range(columns)] for i in range(rows)]
    )
    apart = round(outliers * rows * columns)
    places = sorted(
        ((i, j) for i in range(rows) for j in range(columns)), key=lambda at: -abs(scaled[at])
    )
    zeroed = scaled.copy()
    for at in places[:apart]:
        zeroed[at] = 0
    spectrum = np.linalg.svd(zeroed, compute_uv=False) ** 2
    levels = []
    for rank in range(1, min(rows, columns) + 1):
        size = ((rows + columns) * rank + apart) * width + math.ceil(rows * columns / 8)
        if size < rows * columns * width:
            levels.append((rank, size, sum(spectrum[rank:])))
    levels.append((min(rows, columns), rows * columns * width, 0.0))
    return levels, (scaled**2).sum()
