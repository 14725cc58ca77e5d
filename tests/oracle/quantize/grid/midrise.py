"""Chee et al. 2023: even levels between -reach and reach times the root mean square; plain Python.

Zeros were pruned or filled up and do not count in the mean square.
"""

from math import ceil, frexp, inf, ldexp, sqrt


def levels(bits, **_):
    return [code - (2**bits - 1) / 2 for code in range(2**bits)]


def encode(x, scale, zero, bits, **_):
    table = levels(bits)
    if scale == 0:
        return 0 if x < 0 else len(table) - 1
    return min(range(len(table)), key=lambda code: (abs(table[code] - x / scale), code))


def decode(code, scale, zero, bits, **_):
    return levels(bits)[code] * scale


def fit(weights, importance, bits, search=8, narrowest=0.8, reach=2.4):
    """-> scale of least weighted squared error, None."""
    own = [w for w in weights if w != 0]
    size = sqrt(sum(w * w for w in own) / len(own)) if own else 0.0
    best = (inf, None)
    for turn in range(search):
        share = 1 - (1 - narrowest) * turn / max(1, search - 1)
        step = 2 * reach * size * share / (2**bits - 1)
        mantissa, exponent = frexp(step)
        scale = ldexp(ceil(mantissa * 256), exponent - 8) if step >= 2.0**-100 else 0.0
        loss = 0.0
        for w, h in zip(weights, importance, strict=True):
            loss += h * (decode(encode(w, scale, zero=None, bits=bits), scale, None, bits) - w) ** 2
        if loss < best[0]:
            best = (loss, scale)
    return best[1], None
