"""arXiv:2503.20783: each answer's sum over tokens divided by a constant, the mean over answers."""


def reference(value, keep, limit):
    sums = [
        sum(v for v, k in zip(vs, ks, strict=True) if k) / limit
        for vs, ks in zip(value, keep, strict=True)
    ]
    return sum(sums) / len(sums)
