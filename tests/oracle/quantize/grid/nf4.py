"""Dettmers et al. 2023, eq. 4 and appendix E: NormalFloat levels; plain Python in double precision.

`PUBLISHED` is the table of appendix E.
"""

import struct
from functools import cache
from math import ceil, frexp, inf, ldexp
from statistics import NormalDist

PUBLISHED = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


@cache
def _table(bits):
    """Quantiles of both halves, largest 1, as single precision stores them."""
    codes = 2**bits
    outer = 1 - 0.5 * (1 / (2 * codes) + 1 / (2 * (codes - 1)))
    quantile = NormalDist().inv_cdf
    table = [0.0]
    for sign, count in ((1, codes // 2), (-1, codes // 2 - 1)):
        for i in range(1, count + 1):
            table.append(sign * quantile(0.5 + (outer - 0.5) * i / count))
    top = max(table)
    return [struct.unpack("f", struct.pack("f", x / top))[0] for x in sorted(table)]


def levels(bits, **_):
    return _table(bits)


def encode(x, scale, zero, bits, **_):
    table = levels(bits)
    return min(range(len(table)), key=lambda code: (abs(table[code] - x / scale), code))


def decode(code, scale, zero, bits, **_):
    return levels(bits)[code] * scale


def fit(weights, importance, bits, search=8, narrowest=0.8):
    """-> scale of least weighted squared error, None."""
    best, table = (inf, None), levels(bits)
    for turn in range(search):
        share = 1 - (1 - narrowest) * turn / max(1, search - 1)
        top = share * max(abs(w) for w in weights)
        mantissa, exponent = frexp(top if top >= 2.0**-100 else 1.0)
        scale = ldexp(ceil(mantissa * 256), exponent - 8)
        loss = 0.0
        for w, h in zip(weights, importance, strict=True):
            loss += h * min((level * scale - w) ** 2 for level in table)
        if loss < best[0]:
            best = (loss, scale)
    return best[1], None
