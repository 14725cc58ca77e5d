"""Bergsma et al. 2025, arXiv:2502.15938: equal decrements after the warm-up."""


def reference(step, total, warmup, final):
    """Share of the peak at `step`, by walking there."""
    climb = round(warmup * total)
    if step < climb:
        return (step + 1) / climb
    share = 1.0
    for _ in range(step - climb):
        share -= (1 - final) / (total - climb)
    return share
