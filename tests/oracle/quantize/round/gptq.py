"""Optimal brain quantization in GPTQ's fixed order: Frantar et al. 2022, eq. 2 and 3, in numpy.

Row by row, with the inverse of the remaining Hessian kept up to date by Gaussian elimination:
after weight q is quantized, w_F -= (w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_:,q and
H_F^-1 -= (H_F^-1)_:,q (H_F^-1)_q,: / [H_F^-1]_qq. No Cholesky factor, no blocks, no shared rows.
"""

from math import ceil

import numpy as np


def reference(weight, gram, bits, group, keep, grid, grid_fields, damping=0.01, order="activation"):
    """Weight [O, I] -> codes [O, I], scale and zero [O, groups], decoded [O, I], all as lists."""
    gram = np.array(gram, dtype=np.float64)
    width, energy = len(gram), [float(gram[i, i]) for i in range(len(gram))]
    hessian = gram + damping * np.mean(energy) * np.eye(width)
    sequence = list(range(width))
    if order == "activation":
        sequence.sort(key=lambda i: -energy[i])
    groups = [range(g * group, min((g + 1) * group, width)) for g in range(ceil(width / group))]
    codes, scales, zeros, decoded = [], [], [], []
    for row, alive in zip(weight, keep, strict=True):
        w = np.array([float(x) if a else 0.0 for x, a in zip(row, alive, strict=True)])
        inverse = np.linalg.inv(hessian)
        fitted = {}

        def lay(g, w=w, alive=alive, fitted=fitted):
            values = [float(w[i]) if alive[i] else 0.0 for i in groups[g]]
            fitted[g] = grid.fit(values, [energy[i] for i in groups[g]], bits, **grid_fields)

        if order == "activation":
            for g in range(len(groups)):
                lay(g)
        code, value = [0] * width, [0.0] * width
        for q in sequence:
            g = q // group
            if g not in fitted:
                lay(g)
            x = float(w[q]) if alive[q] else 0.0
            code[q] = grid.encode(x, *fitted[g], bits, **grid_fields)
            if alive[q]:
                value[q] = grid.decode(code[q], *fitted[g], bits, **grid_fields)
            w -= (w[q] - value[q]) / inverse[q, q] * inverse[:, q]
            inverse = inverse - np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]
            inverse[q, q] = 1.0  # out of play: its row and column are zero, and so stay
        codes.append(code)
        scales.append([fitted[g][0] for g in range(len(groups))])
        zeros.append([fitted[g][1] for g in range(len(groups))])
        decoded.append(value)
    return codes, scales, zeros, decoded
