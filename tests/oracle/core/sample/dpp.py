"""Nouy and Michel 2023: repeated projection determinantal processes, all sets one by one."""

from collections import defaultdict
from itertools import combinations

import numpy as np


def process(basis):
    """Every set of as many rows as there are columns, with its probability."""
    kernel = basis @ basis.T
    sets = combinations(range(len(basis)), basis.shape[1])
    return {rows: np.linalg.det(kernel[np.ix_(rows, rows)]) for rows in sets}


def reference(features, count):
    left, size, _ = np.linalg.svd(features, full_matrices=False)
    basis = left[:, size > 1e-9 * size[0]]
    found, missing = {(): 1.0}, count
    while missing:
        both = defaultdict(float)
        for one, chance in found.items():
            for other, more in process(basis[:, :missing]).items():
                both[tuple(sorted(one + other))] += chance * more
        found, missing = dict(both), missing - min(missing, basis.shape[1])
    return found
