"""arXiv:2503.20783, section 3.2: A_i = r_i - mean(r) within the group."""


def reference(reward):
    return [[r - sum(group) / len(group) for r in group] for group in reward]
