"""arXiv:2505.22617, KL-Cov: the distance at each token, and which tokens are held."""


def reference(rollout):
    now, old, mask = rollout.logp.tolist(), rollout.old.tolist(), rollout.mask.tolist()
    return [
        [abs(a - b) if inside else 0.0 for a, b, inside in zip(*rows, strict=True)]
        for rows in zip(now, old, mask, strict=True)
    ]


def held(rollout, share):
    places = [
        (i, t)
        for i, row in enumerate(rollout.mask.tolist())
        for t, inside in enumerate(row)
        if inside
    ]
    gain = {place: rollout.advantage[place].item() for place in places}
    log = {place: rollout.old[place].item() for place in places}
    mean_gain = sum(gain.values()) / len(places)
    mean_log = sum(log.values()) / len(places)
    ranked = sorted(places, key=lambda p: -(gain[p] - mean_gain) * (log[p] - mean_log))
    chosen = set(ranked[: max(1, int(len(places) * share))])
    rows, columns = rollout.mask.shape
    return [[float((i, t) in chosen) for t in range(columns)] for i in range(rows)]
