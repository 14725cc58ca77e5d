"""arXiv:2402.03300, eq. 4: p_ref / p - log(p_ref / p) - 1 for each token of an answer."""

import math


def reference(rollout):
    result = []
    rows = zip(
        rollout.logp.tolist(), rollout.reference.tolist(), rollout.mask.tolist(), strict=True
    )
    for logp, start, inside in rows:
        row = []
        for a, b, m in zip(logp, start, inside, strict=True):
            quotient = math.exp(b) / math.exp(a)
            row.append(quotient - math.log(quotient) - 1 if m else 0.0)
        result.append(row)
    return result
