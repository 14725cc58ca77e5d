"""arXiv:1707.06347, eq. 7 with the bounds of arXiv:2503.14476, eq. 10, for one token.

Returns the value and its derivative with respect to logp; dw / dlogp = w.
"""

import math


def reference(log_ratio, logp, advantage, low, high):
    weight = math.exp(log_ratio)
    bounded = min(max(weight, 1 - low), 1 + high)
    plain, clipped = weight * advantage, bounded * advantage
    stopped = clipped < plain
    return min(plain, clipped), 0.0 if stopped else weight * advantage, stopped
