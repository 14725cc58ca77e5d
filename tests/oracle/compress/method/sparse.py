"""What a layer can be brought to by pruning within rows, counted weight by weight; and SparseGPT.

`swept` is algorithm 1 of arXiv:2301.00774 with the mask of section 3.3 (adaptive), one row and one
weight at a time: an explicit inverse that loses each column as it is passed, no Cholesky factor.
"""

import math

import numpy as np


def reference(weight, gram, width):
    """(kept in a row, bytes, error of dropping the rest by Wanda's score), then the layer."""
    rows, columns = weight.shape
    score = [[weight[i, j] ** 2 * gram[j, j] for j in range(columns)] for i in range(rows)]
    levels = []
    for kept in range(1, columns):
        size = rows * kept * width + math.ceil(rows * columns / 8)
        if size < rows * columns * width:
            levels.append((kept, size, sum(sum(sorted(row)[: columns - kept]) for row in score)))
    levels.append((columns, rows * columns * width, 0.0))
    return levels, sum(map(sum, score))


def swept(weight, units, gram, block, damping):
    """Of every row `units` weights stay, of every block of columns its share of them."""
    rows, size = weight.shape
    result = weight.copy()
    for start in range(0, size, block):
        stop = min(start + block, size)
        goes = stop - start - (round(units * stop / size) - round(units * start / size))
        rest = gram[start:, start:]
        level = damping * sum(rest[j, j] for j in range(size - start)) / (size - start)
        first = np.linalg.inv(rest + level * np.eye(size - start))
        for i in range(rows):
            cost = [result[i, j] ** 2 / first[j - start, j - start] for j in range(start, stop)]
            gone = sorted(range(stop - start), key=cost.__getitem__)[:goes]
            inverse = first.copy()
            for j in range(stop - start):
                if j in gone:
                    result[i, start:] -= result[i, start + j] / inverse[j, j] * inverse[j]
                    result[i, start + j] = 0.0
                inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
                inverse[j, :] = 0.0
                inverse[:, j] = 0.0
    return result
