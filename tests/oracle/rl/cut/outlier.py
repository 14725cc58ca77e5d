"""arXiv:2601.03969: group by group, with the statistics module's mean and sample deviation."""

import math
import statistics


def reference(rollout, deviations, margin):
    lengths = [sum(row) for row in rollout.mask.tolist()]
    groups = {}
    for i, group in enumerate(rollout.group.tolist()):
        groups.setdefault(group, []).append(i)
    kept = list(lengths)
    for members in groups.values():
        if any(rollout.score[i].item() != 1.0 for i in members) or len(members) < 2:
            continue
        own = [lengths[i] for i in members]
        limit = math.floor(statistics.mean(own) + deviations * statistics.stdev(own))
        for i in members:
            if lengths[i] - limit >= margin:
                kept[i] = limit
    return kept
