"""Cohen and Migliorati 2017: independent draws by leverage, all sequences one by one."""

from collections import defaultdict
from itertools import product
from math import prod

import numpy as np


def reference(features, count):
    hat = features @ np.linalg.pinv(features)
    chance = [hat[i, i] / np.trace(hat) for i in range(len(features))]
    found = defaultdict(float)
    for rows in product(range(len(features)), repeat=count):
        found[tuple(sorted(rows))] += prod(chance[i] for i in rows)
    return dict(found)
