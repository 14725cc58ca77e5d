"""Jordan et al. 2024: the update of an O x I matrix times max(1, O / I) ** 0.5."""


def reference(gradients, parameter):
    """List of [O, I] gradients -> list of [O, I] steps."""
    rows, columns = parameter.shape
    return [g * ((rows / columns) ** 0.5 if rows > columns else 1.0) for g in gradients]
