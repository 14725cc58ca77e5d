"""arXiv:2503.14476, eq. 8: 1 / sum |o_i| times the sum over all tokens."""


def reference(value, keep, limit):
    total, count = 0.0, 0
    for values, kept in zip(value, keep, strict=True):
        for v, k in zip(values, kept, strict=True):
            if k:
                total, count = total + v, count + 1
    return total / count
