"""arXiv:2305.14152, eq. 2, scales moved by a factor exp(theta): W = s exp(theta) (code - zero)."""

import math


def reference(codes, scale, zero, theta, group):
    return [
        [
            scale[i][j // group] * math.exp(theta[i][j // group]) * (code - zero[i][j // group])
            for j, code in enumerate(row)
        ]
        for i, row in enumerate(codes)
    ]
