"""arXiv:2503.14476, eq. 13, added to the reward: three cases of the answer's length."""


def reference(rollout, share, weight):
    longest = rollout.limit
    cache = share * longest
    result = []
    for reward, row in zip(rollout.reward.tolist(), rollout.mask.tolist(), strict=True):
        length = sum(row)
        if length <= longest - cache:
            penalty = 0.0
        elif length <= longest:
            penalty = ((longest - cache) - length) / cache
        else:
            penalty = -1.0
        result.append(reward + weight * penalty)
    return result
