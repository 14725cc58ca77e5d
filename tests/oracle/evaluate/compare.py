"""Paired comparisons, written out.

McNemar: under no change each flip is a fair coin; the p-value adds the chances of all splits that
are no likelier than the one seen. Holm: go through the p-values from the smallest; the i-th of n is
rejected at alpha while n - i + 1 times it stays within alpha.
"""

from math import comb


def mcnemar(lost, gained):
    """Two-sided p-value of the split."""
    flips = lost + gained
    chance = [comb(flips, i) for i in range(flips + 1)]
    return sum(c for c in chance if c <= chance[lost]) / 2**flips


def rejected(ps, alpha):
    """Which hypotheses Holm's procedure rejects."""
    found = [False] * len(ps)
    for step, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if ps[index] * (len(ps) - step) > alpha:
            break
        found[index] = True
    return found


def resamples(numerator, denominator, picks):
    """Ratio of sums over each list of chosen items."""
    return [sum(numerator[i] for i in pick) / sum(denominator[i] for i in pick) for pick in picks]
