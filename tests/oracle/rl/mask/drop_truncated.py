"""arXiv:2503.14476, section 3.4: the loss of cut answers is masked."""


def reference(rollout):
    inside, finished = rollout.mask.tolist(), rollout.finished.tolist()
    return [
        [1.0 if m and done else 0.0 for m in row]
        for row, done in zip(inside, finished, strict=True)
    ]
