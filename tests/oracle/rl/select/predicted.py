"""arXiv:2601.03969: groups with varying rewards, and how many prompts to draw for them."""

import numpy as np


def reference(rollout):
    groups = {}
    for group, reward in zip(rollout.group.tolist(), rollout.reward.tolist(), strict=True):
        groups.setdefault(group, []).append(reward)
    return [bool(np.std(rewards) > 0) for rewards in groups.values()]


def asked(missing, shares, window, first, least, most):
    recent = np.array(shares[-window:], dtype=np.float64)
    if recent.size == 0:
        factor = first
    elif recent.mean() == 0:
        factor = most
    else:
        factor = float(np.clip((1 + recent.std()) / recent.mean(), least, most))
    return int(np.ceil(missing * factor))
