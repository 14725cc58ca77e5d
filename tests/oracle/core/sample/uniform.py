"""Every set of `count` different rows is as likely as any other."""

from itertools import combinations


def reference(features, count):
    sets = list(combinations(range(len(features)), count))
    return dict.fromkeys(sets, 1 / len(sets))
