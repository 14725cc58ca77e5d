"""Elhoushi and Johnson 2025: weighted k-means of each row's scaled weights; plain Python.

Clusters are assigned point by point, without sorting or running sums.
"""

import struct
from math import ceil, frexp, inf, ldexp
from statistics import NormalDist


def levels(bits, **_):
    half = 2 ** (bits - 1)
    exact = [i / (half - 0.5) for i in range(-half, half)]
    return [struct.unpack("f", struct.pack("f", x))[0] for x in exact]


def nearest(x, values):
    return min(range(len(values)), key=lambda code: (abs(values[code] - x), code))


def encode(x, scale, zero, bits, **_):
    return nearest(x / scale, levels(bits))


def decode(code, scale, zero, bits, **_):
    return levels(bits)[code] * scale


def fit(weights, importance, bits, search=8, narrowest=0.8, table=None, **_):
    """-> scale of least weighted squared error on a table, by default the even one; None."""
    best, table = (inf, None), table or levels(bits)
    for turn in range(search):
        share = 1 - (1 - narrowest) * turn / max(1, search - 1)
        top = share * max(abs(w) for w in weights)
        mantissa, exponent = frexp(top if top >= 2.0**-100 else 1.0)
        scale = ldexp(ceil(mantissa * 256), exponent - 8)
        loss = 0.0
        for w, h in zip(weights, importance, strict=True):
            loss += h * (table[nearest(w / scale, table)] * scale - w) ** 2
        if loss < best[0]:
            best = (loss, scale)
    return best[1], None


def means(points, table, rounds):
    """-> levels after so many rounds, and their loss; `points` are (value, mass)."""
    table = list(table)
    for _ in range(rounds):
        cells = [[] for _ in table]
        for x, m in points:
            cells[nearest(x, table)].append((x, m))
        for code, cell in enumerate(cells):
            mass = sum(m for _, m in cell)
            if table[code] != 0 and mass > 0:
                table[code] = sum(m * x for x, m in cell) / mass
    return sum(m * (x - table[nearest(x, table)]) ** 2 for x, m in points), table


def farthest(points, count):
    points = sorted(points, key=lambda point: point[0])
    table = [0.0]
    while len(table) < count:
        errors = [m * min((x - level) ** 2 for level in table) for x, m in points]
        table.append(points[errors.index(max(errors))][0])
    return sorted(table)


def normal(bits):
    """NormalFloat of Dettmers et al. 2023, the second start."""
    half = 2 ** (bits - 1)
    outer = 1 - 0.5 * (1 / (4 * half) + 1 / (4 * half - 2))
    quantile = NormalDist().inv_cdf
    table = [0.0]
    for sign, count in ((1, half), (-1, half - 1)):
        table += [sign * quantile(0.5 + (outer - 0.5) * i / count) for i in range(1, count + 1)]
    top = max(table)
    return [struct.unpack("f", struct.pack("f", x / top))[0] for x in sorted(table)]


def learn(groups, importance, bits, search=8, narrowest=0.8, rounds=20):
    """Weights [O][G][N], importance [G][N] -> tables [O][K], or [K] where rows are short."""
    length = len(importance) * len(importance[0])
    alone = len(groups) > 1 and bits <= 4 and 16 * 2**bits <= bits * length
    found = []
    for rows in [[row] for row in groups] if alone else [groups]:
        tried = []
        for start in (levels(bits), normal(bits), None):
            points = []
            for row in rows:
                for weights, counts in zip(row, importance, strict=True):
                    scale, _ = fit(weights, counts, bits, search, narrowest, start)
                    points += [
                        (w / scale, h * scale**2) for w, h in zip(weights, counts, strict=True)
                    ]
            tried.append(means(points, start or farthest(points, 2**bits), rounds))
        best = min(tried, key=lambda pair: pair[0])[1]
        found.append([struct.unpack("e", struct.pack("e", x))[0] for x in best])
    return found if alone else found[0]
