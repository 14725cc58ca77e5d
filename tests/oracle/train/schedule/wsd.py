"""Hu et al. 2024, arXiv:2404.06395, eq. 1: three cases; the last one as in arXiv:2405.18392."""


def reference(step, total, warmup, cooldown, final):
    """Share of the peak at `step`."""
    climb = round(warmup * total)
    if step < climb:
        return (step + 1) / climb
    left = total - climb
    begin = climb + left * (1 - cooldown)
    if step <= begin:
        return 1.0
    share = (step - begin) / (total - begin)
    return final + (1 - final) * (1 - share**0.5)
