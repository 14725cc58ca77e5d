"""arXiv:1707.06347, section 3: the ratio of the two probabilities of a token."""


def reference(logp, old, mask):
    value = [
        [a - b if m else 0.0 for a, b, m in zip(*row, strict=True)]
        for row in zip(logp, old, mask, strict=True)
    ]
    gradient = [[1.0 if m else 0.0 for m in row] for row in mask]
    return value, gradient
