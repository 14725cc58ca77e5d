"""arXiv:2402.03300, eq. 3: 1 / G sum over answers of 1 / |o_i| sum over tokens."""


def reference(value, keep, limit):
    means = []
    for values, kept in zip(value, keep, strict=True):
        inside = [v for v, k in zip(values, kept, strict=True) if k]
        if inside:
            means.append(sum(inside) / len(inside))
    return sum(means) / len(means)
