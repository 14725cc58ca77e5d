"""Rounding to nearest, weight by weight, on a grid given as an oracle of its own."""

from math import ceil


def reference(weight, gram, bits, group, keep, grid, grid_fields):
    """Weight [O, I] -> codes [O, I], scale and zero [O, groups], decoded [O, I], all as lists."""
    codes, scales, zeros, decoded = [], [], [], []
    for row, alive in zip(weight, keep, strict=True):
        row = [float(w) if a else 0.0 for w, a in zip(row, alive, strict=True)]
        fitted = []
        for g in range(ceil(len(row) / group)):
            members = range(g * group, min((g + 1) * group, len(row)))
            values, energy = [row[i] for i in members], [float(gram[i][i]) for i in members]
            fitted.append(grid.fit(values, energy, bits, **grid_fields))
        line = [grid.encode(w, *fitted[i // group], bits, **grid_fields) for i, w in enumerate(row)]
        codes.append(line)
        scales.append([scale for scale, _ in fitted])
        zeros.append([zero for _, zero in fitted])
        decoded.append(
            [
                grid.decode(c, *fitted[i // group], bits, **grid_fields) if alive[i] else 0.0
                for i, c in enumerate(line)
            ]
        )
    return codes, scales, zeros, decoded
