"""Chen et al. 2023, arXiv:2302.06675, algorithm 2, one number at a time."""

import numpy as np


def reference(gradients, parameter, blend, mean):
    """List of [O, I] gradients -> list of [O, I] steps."""
    average = np.zeros(parameter.shape)
    steps = []
    for gradient in gradients:
        step = np.zeros(parameter.shape)
        for place, g in np.ndenumerate(gradient):
            mixed = blend * average[place] + (1 - blend) * g
            step[place] = (mixed > 0) * 1.0 - (mixed < 0) * 1.0
            average[place] = mean * average[place] + (1 - mean) * g
        steps.append(step)
    return steps
