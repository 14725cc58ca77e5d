"""arXiv:2507.18071, eq. 7 and 14: s = (p(y) / p_old(y)) ** (1 / |y|); each token's own gradient."""

import math


def reference(logp, old, mask):
    value, gradient = [], []
    for new, before, inside in zip(logp, old, mask, strict=True):
        likelihood = math.prod(math.exp(a) for a, m in zip(new, inside, strict=True) if m)
        earlier = math.prod(math.exp(b) for b, m in zip(before, inside, strict=True) if m)
        weight = (likelihood / earlier) ** (1 / sum(inside)) if any(inside) else 1.0
        value.append([math.log(weight) if m else 0.0 for m in inside])
        gradient.append([1.0 if m else 0.0 for m in inside])
    return value, gradient
