"""arXiv:2503.14476, eq. 11, for verifier scores."""


def reference(rollout):
    groups = {}
    for group, score in zip(rollout.group.tolist(), rollout.score.tolist(), strict=True):
        groups.setdefault(group, []).append(score)
    return [min(scores) < max(scores) for scores in groups.values()]
