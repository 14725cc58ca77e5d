"""LAMP, equation 4, literally: e_u over the sum of e_v for all v with e_v >= e_u, in O(n^2).

A layer is given by its units' energies in descending order; the steps of the profile end at the
counts in `units`, and a step over several units has their energies' mean.
"""

import itertools


def reference(layers):
    result = []
    for layer in layers:
        energies, units, prices = layer["energies"], layer["units"], []
        for before, after in itertools.pairwise(units):
            within = energies[before:after]
            mean = sum(within) / len(within)
            at_least = sum(e for position, e in enumerate(energies) if position < after)
            prices.append(mean / at_least)
        result.append(prices)
    return result


def scores(energies):
    """One unit a step: equation 4 with ties broken by position."""
    return [
        e / sum(f for q, f in enumerate(energies) if f > e or (f == e and q <= p))
        for p, e in enumerate(energies)
    ]
