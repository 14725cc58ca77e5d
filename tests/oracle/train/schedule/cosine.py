"""Loshchilov, Hutter 2016, arXiv:1608.03983, eq. 5; T_cur and T_i count after the warm-up."""

import math


def reference(step, total, warmup, final):
    """Share of the peak at `step`."""
    climb = round(warmup * total)
    if step < climb:
        return (step + 1) / climb
    current, period = step - climb, total - climb
    return final + 0.5 * (1.0 - final) * (1 + math.cos(current / period * math.pi))
