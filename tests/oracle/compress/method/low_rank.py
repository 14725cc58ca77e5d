"""What a layer can be brought to by factoring, counted and computed one rank at a time."""

import numpy as np


def reference(weight, gram, width, damping=1e-6):
    """(rank, bytes, error) while two factors are smaller than the layer, then the layer."""
    rows, columns = weight.shape
    mean = sum(gram[j, j] for j in range(columns)) / columns
    lower = np.linalg.cholesky(gram + damping * mean * np.eye(columns))
    spectrum = np.linalg.svd(weight @ lower, compute_uv=False) ** 2
    levels = []
    for rank in range(1, min(rows, columns) + 1):
        size = (rows * rank + rank * columns) * width
        if size < rows * columns * width:
            levels.append((rank, size, sum(spectrum[rank:])))
    levels.append((min(rows, columns), rows * columns * width, 0.0))
    return levels, sum(spectrum)
