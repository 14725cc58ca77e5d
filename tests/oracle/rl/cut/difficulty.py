"""arXiv:2510.15110, section 3.5: tiers of the correctness ratio, each with its length."""


def reference(rollout, levels, shares):
    groups = {}
    for i, group in enumerate(rollout.group.tolist()):
        groups.setdefault(group, []).append(i)
    kept = [sum(row) for row in rollout.mask.tolist()]
    for members in groups.values():
        right = [rollout.score[i].item() for i in members if rollout.finished[i].item()]
        ratio = sum(right) / len(members)
        share = shares[0]
        for level, next_share in zip(levels, shares[1:], strict=True):
            if ratio >= level:
                share = next_share
        for i in members:
            kept[i] = min(kept[i], max(1, int(share * rollout.limit)))
    return kept
