"""The rate climbs along a straight line through the warm-up, then stays."""


def reference(step, total, warmup):
    """Share of the peak at `step`."""
    climb = round(warmup * total)
    return (step + 1) / climb if step < climb else 1.0
