"""arXiv:2510.15110: group mean subtracted, then normalised by mean and deviation of the batch."""

import math


def reference(reward, floor):
    centred = [[r - sum(group) / len(group) for r in group] for group in reward]
    every = [a for group in centred for a in group]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every))
    return [[(a - mean) / (deviation + floor) for a in group] for group in centred]
