"""arXiv:2510.15110, section 4.6, number by number."""


def reference(start, trained, share, scale):
    order = sorted(range(len(start)), key=lambda i: abs(trained[i] - start[i]), reverse=True)
    counted = set(order[: max(1, round(share * len(start)))])
    return [
        a + scale * (b - a) if i in counted else a
        for i, (a, b) in enumerate(zip(start, trained, strict=True))
    ]
