"""arXiv:2402.03300, section 4.1.2: A_i = (r_i - mean(r)) / std(r) within the group."""

import math


def reference(reward, floor):
    result = []
    for group in reward:
        mean = sum(group) / len(group)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / len(group))
        result.append([(r - mean) / (deviation + floor) for r in group])
    return result
