"""arXiv:2602.00983 for one token: the weight is held between bounds that depend on the sign of A.

Returns the value, its derivative with respect to log p (the weight is a constant) and whether the
weight was changed.
"""

import math


def reference(log_ratio, logp, advantage, right_down, right_up, wrong_down, wrong_up):
    weight = math.exp(log_ratio)
    if advantage > 0:
        low, high = 1 - right_down, 1 + right_up
    else:
        low, high = 1 - wrong_down, 1 + wrong_up
    used = low if weight < low else high if weight > high else weight
    return used * advantage * logp, used * advantage, used != weight and advantage != 0
