"""arXiv:2510.15110: an answer that does not end within the limit earns zero."""


def reference(rollout):
    pairs = zip(rollout.reward.tolist(), rollout.finished.tolist(), strict=True)
    return [reward if done else 0.0 for reward, done in pairs]
