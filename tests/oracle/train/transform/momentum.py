"""Polyak 1964: w_{t+1} - w_t = -rate g_t + beta (w_t - w_{t-1}): a sum over the past."""


def reference(gradients, parameter, beta):
    """List of [O, I] gradients -> list of [O, I] steps."""
    return [
        sum(beta ** (t - s) * gradients[s] for s in range(t + 1)) for t in range(len(gradients))
    ]
