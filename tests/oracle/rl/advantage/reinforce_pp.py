"""arXiv:2501.03262: mean and deviation over the whole batch."""

import math


def reference(reward, floor):
    every = [r for group in reward for r in group]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in every) / len(every))
    return [[(r - mean) / (deviation + floor) for r in group] for group in reward]
