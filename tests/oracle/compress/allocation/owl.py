"""OWL, section 3: outlier ratio of a layer, and shares shifted by the blocks' ratios."""

import math


def outlier_ratio(weight, gram, outlier=5.0):
    rows, columns = weight.shape
    size = [
        [abs(weight[i, j]) * math.sqrt(gram[j, j]) for j in range(columns)] for i in range(rows)
    ]
    mean = sum(map(sum, size)) / (rows * columns)
    return sum(value > outlier * mean for row in size for value in row) / (rows * columns)


def reference(layers, spread=0.08):
    """Shift of each layer less the share that it has, for every step."""
    ratio = {}
    for block in {layer["block"] for layer in layers}:
        weights = sum(math.prod(x["shape"]) for x in layers if x["block"] == block)
        outliers = sum(math.prod(x["shape"]) * x["figure"] for x in layers if x["block"] == block)
        ratio[block] = outliers / weights
    low, high = min(ratio.values()), max(ratio.values())
    result = []
    for layer in layers:
        unit = (ratio[layer["block"]] - low) / (high - low) if high > low else 0.0
        result.append([2 * spread * unit - b / layer["bytes"][-1] for b in layer["bytes"][:-1]])
    return result
