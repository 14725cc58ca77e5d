"""Max 1960: least-error levels for normal numbers by shooting outwards from 0; plain Python.

The first positive level is guessed. A cell ends where its mean is its level, the next level lies as
far beyond that end, and the guess is right if the last level is the mean of all that remains.
"""

import struct
from functools import cache
from math import ceil, erfc, exp, frexp, inf, ldexp, pi, sqrt


def mean(low, high):
    """E [x | low < x < high] of a standard normal x."""
    edges = [0.0 if t == inf else exp(-t * t / 2) / sqrt(2 * pi) for t in (low, high)]
    beyond = [0.0 if t == inf else erfc(t / sqrt(2)) / 2 for t in (low, high)]
    return (edges[0] - edges[1]) / (beyond[0] - beyond[1])


def bisect(wrong, low, high):
    """The place in [low, high] where `wrong` turns from False to True."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if wrong(middle) else (middle, high)
    return high


def shoot(first, count):
    """-> positive levels, and whether the guess was too large."""
    table, start = [first], 0.0
    for _ in range(count - 1):
        level, low = table[-1], start
        if mean(low, inf) <= level:
            return table, True
        start = bisect(lambda t, low=low, level=level: mean(low, t) > level, level, level + 2)
        table.append(2 * start - level)
    return table, mean(start, inf) < table[-1]


@cache
def exact(bits):
    """The positive levels."""
    count = 2 ** (bits - 1)
    return shoot(bisect(lambda y: shoot(y, count)[1], 1e-4, 1.0), count)[0]


@cache
def levels(bits, **_):
    half = [struct.unpack("f", struct.pack("f", y))[0] for y in exact(bits)]
    return [-y for y in reversed(half)] + half


def encode(x, scale, zero, bits, **_):
    table = levels(bits)
    if scale == 0:
        return 0 if x < 0 else len(table) - 1
    return min(range(len(table)), key=lambda code: (abs(table[code] - x / scale), code))


def decode(code, scale, zero, bits, **_):
    return levels(bits)[code] * scale


def fit(weights, importance, bits, search=8, narrowest=0.8, **_):
    """-> scale of least weighted squared error among shares of the root mean square, None."""
    own = [w for w in weights if w != 0]
    size = sqrt(sum(w * w for w in own) / len(own)) if own else 0.0
    best = (inf, None)
    for turn in range(search):
        share = 1 - (1 - narrowest) * turn / max(1, search - 1)
        mantissa, exponent = frexp(size * share)
        scale = ldexp(ceil(mantissa * 256), exponent - 8) if size * share >= 2.0**-100 else 0.0
        loss = 0.0
        for w, h in zip(weights, importance, strict=True):
            loss += h * (decode(encode(w, scale, None, bits), scale, None, bits) - w) ** 2
        if loss < best[0]:
            best = (loss, scale)
    return best[1], None
