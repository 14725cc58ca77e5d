"""What a layer can be brought to by pruning within rows, counted weight by weight."""

import math


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
