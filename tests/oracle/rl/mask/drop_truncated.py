"""arXiv:2503.14476, section 3.4: the loss of answers that were cut at the limit is masked."""


def reference(rollout):
    rows = zip(rollout.finished.tolist(), rollout.going.tolist(), strict=True)
    cut = [not finished and not going for finished, going in rows]
    return [
        [1.0 if m and not gone else 0.0 for m in row]
        for row, gone in zip(rollout.mask.tolist(), cut, strict=True)
    ]
