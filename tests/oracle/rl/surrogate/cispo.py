"""arXiv:2506.13585, eq. 4-5, for one token: the bounded weight is a constant to the gradient."""

import math


def reference(log_ratio, logp, advantage, high):
    weight = math.exp(log_ratio)
    used = weight if weight < 1 + high else 1 + high
    return used * advantage * logp, used * advantage, weight > 1 + high and advantage != 0
