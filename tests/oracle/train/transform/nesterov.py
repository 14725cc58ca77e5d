"""Sutskever et al. 2013, eq. 3-4, followed at the point that is looked ahead to.

With v_{t+1} = beta v_t - rate grad(w_t + beta v_t), the point y_t = w_t + beta v_t moves by
y_{t+1} - y_t = v_{t+1} + beta v_{t+1} - beta v_t.
"""

import numpy as np


def reference(gradients, parameter, beta):
    """List of [O, I] gradients (taken at y) -> list of [O, I] steps of y, at rate one."""
    velocity = np.zeros(parameter.shape)
    steps = []
    for gradient in gradients:
        after = beta * velocity - gradient
        steps.append(-(after + beta * after - beta * velocity))
        velocity = after
    return steps
