"""Jacob et al. 2017, eq. 1: r = S (q - Z); plain Python in double precision.

The clipping range is the best of `search` shares of the whole one, from 1 down to `narrowest`.
"""

import builtins
from math import ceil, frexp, inf, ldexp


def up(scale):
    """The next number with an 8-bit significand that is not smaller."""
    mantissa, exponent = frexp(scale if scale >= 2.0**-100 else 1.0)
    return ldexp(ceil(mantissa * 256), exponent - 8)


def levels(bits, range="asymmetric", **_):
    first = 0 if range == "asymmetric" else -(2 ** (bits - 1))
    return [first + i for i in builtins.range(2**bits)]


def encode(x, scale, zero, bits, range="asymmetric", **_):
    middle = zero if range == "asymmetric" else 2 ** (bits - 1)
    return int(min(max(round(x / scale + middle), 0), 2**bits - 1))


def decode(code, scale, zero, bits, range="asymmetric", **_):
    middle = zero if range == "asymmetric" else 2 ** (bits - 1)
    return (code - middle) * scale


def fit(weights, importance, bits, range="asymmetric", search=8, narrowest=0.8):
    """-> scale, zero (None if symmetric) of least weighted squared error."""
    best = (inf, None, None)
    least, most = min([0.0, *weights]), max([0.0, *weights])
    for turn in builtins.range(search):
        share = 1 - (1 - narrowest) * turn / max(1, search - 1)
        low, high = least * share, most * share
        if range == "asymmetric":
            scale = up((high - low) / (2**bits - 1))
            zero = min(max(round(-low / scale), 0), 2**bits - 1)
        else:
            scale, zero = up(2 * max(-low, high) / (2**bits - 1)), None
        loss = 0.0
        for w, h in zip(weights, importance, strict=True):
            code = encode(w, scale, zero, bits, range)
            loss += h * (decode(code, scale, zero, bits, range) - w) ** 2
        if loss < best[0]:
            best = (loss, scale, zero)
    return best[1], best[2]
