"""Kingma, Ba 2014, arXiv:1412.6980, algorithm 1, one number at a time."""

import numpy as np


def reference(gradients, parameter, mean, square, eps):
    """List of [O, I] gradients -> list of [O, I] steps."""
    first, second = np.zeros(parameter.shape), np.zeros(parameter.shape)
    steps = []
    for t, gradient in enumerate(gradients, start=1):
        step = np.zeros(parameter.shape)
        for place, g in np.ndenumerate(gradient):
            first[place] = mean * first[place] + (1 - mean) * g
            second[place] = square * second[place] + (1 - square) * g * g
            unbiased = first[place] / (1 - mean**t)
            step[place] = unbiased / (np.sqrt(second[place] / (1 - square**t)) + eps)
        steps.append(step)
    return steps
