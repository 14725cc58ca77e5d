"""Yvinec et al. 2023: powers of integers as levels; plain Python in double precision.

`learn` tries every exponent on every group of a layer.
"""

import struct
from math import ceil, frexp, inf, ldexp


def table(exponent, bits):
    """sign(i) |i|^(1/a), stretched so that half the last gap beyond the top is 2^(b-1) - 1/2."""
    half = 2 ** (bits - 1)
    raw = [(-1 if i < 0 else 1) * abs(i) ** (1 / exponent) for i in range(-half, half)]
    stretch = (half - 0.5) / (raw[-1] + (raw[-1] - raw[-2]) / 2)
    return [struct.unpack("f", struct.pack("f", x * stretch))[0] for x in raw]


def levels(bits, **_):
    return [float(i) for i in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]


def nearest(x, scale, values):
    return min(range(len(values)), key=lambda code: (abs(values[code] - x / scale), code))


def encode(x, scale, zero, bits, **_):
    return nearest(x, scale, levels(bits))


def decode(code, scale, zero, bits, **_):
    return levels(bits)[code] * scale


def lay(weights, importance, bits, values, search, narrowest):
    """-> least loss of a group, and its scale."""
    best = (inf, None)
    for turn in range(search):
        share = 1 - (1 - narrowest) * turn / max(1, search - 1)
        top = share * max(abs(w) for w in weights) / (2 ** (bits - 1) - 0.5)
        mantissa, exponent = frexp(top if top >= 2.0**-100 else 1.0)
        scale = ldexp(ceil(mantissa * 256), exponent - 8)
        loss = 0.0
        for w, h in zip(weights, importance, strict=True):
            loss += h * (values[nearest(w, scale, values)] * scale - w) ** 2
        if loss < best[0]:
            best = (loss, scale)
    return best


def fit(weights, importance, bits, search=8, narrowest=0.8, **_):
    return lay(weights, importance, bits, levels(bits), search, narrowest)[1], None


def learn(groups, importance, bits, search=8, narrowest=0.8, tries=8, lowest=0.3):
    """Weights [O][G][N], importance [G][N] -> the exponent of least error in all."""
    best = (inf, None)
    for turn in range(tries):
        exponent = 1 - (1 - lowest) * turn / max(1, tries - 1)
        values, loss = table(exponent, bits), 0.0
        for row in groups:
            for weights, counts in zip(row, importance, strict=True):
                loss += lay(weights, counts, bits, values, search, narrowest)[0]
        if loss < best[0]:
            best = (loss, exponent)
    return best[1]
