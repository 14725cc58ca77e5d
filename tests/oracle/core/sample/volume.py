"""Nouy and Michel 2023: the density of volume-rescaled sampling, all sequences one by one."""

from collections import defaultdict
from itertools import product
from math import prod

import numpy as np


def reference(features, count):
    left, size, _ = np.linalg.svd(features, full_matrices=False)
    basis = left[:, : min(count, int((size > 1e-9 * size[0]).sum()))]
    leverage = [row @ row for row in basis]
    chance = [one / sum(leverage) for one in leverage]
    found = defaultdict(float)
    for rows in product(range(len(features)), repeat=count):
        moments = sum(np.outer(basis[i], basis[i]) / chance[i] for i in rows)
        found[tuple(sorted(rows))] += np.linalg.det(moments) * prod(chance[i] for i in rows)
    whole = sum(found.values())
    return {rows: value / whole for rows, value in found.items()}
