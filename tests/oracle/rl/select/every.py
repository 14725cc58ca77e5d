"""Nothing is dropped."""


def reference(rollout):
    return [True] * len(set(rollout.group.tolist()))
