"""Importance-weighted score function for one token: gradient w A, nothing bounded."""

import math


def reference(log_ratio, logp, advantage):
    weight = math.exp(log_ratio)
    return weight * advantage, weight * advantage, False
