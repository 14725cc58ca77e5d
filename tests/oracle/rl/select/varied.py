"""arXiv:2503.14476, eq. 11, for rewards after shaping."""


def reference(rollout):
    groups = {}
    for group, reward in zip(rollout.group.tolist(), rollout.reward.tolist(), strict=True):
        groups.setdefault(group, set()).add(reward)
    return [len(rewards) > 1 for rewards in groups.values()]
