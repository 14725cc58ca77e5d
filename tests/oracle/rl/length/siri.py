"""arXiv:2509.25176, section 4.3: the piecewise definition over phases from 0 to 2 pi.

The paper's stair-cosine has its corners at 1/4, 3/4, 5/4 and 7/4 pi; here they are at hold / 2 pi
and its mirror images, so that hold = 1/2 gives the paper's.
"""

import math


def reference(step, steps, longest, shortest, cycles, hold):
    period = steps / cycles
    t = step
    while t >= period:
        t -= period
    phi = 2 * math.pi * t / period
    corner = hold / 2 * math.pi
    middle, swing = (longest + shortest) / 2, (longest - shortest) / 2
    if phi < corner or phi >= 2 * math.pi - corner:
        return longest
    if phi < math.pi - corner:
        return round(middle + swing * math.cos((phi - corner) / (1 - hold)))
    if phi < math.pi + corner:
        return shortest
    return round(middle - swing * math.cos((phi - math.pi - corner) / (1 - hold)))
