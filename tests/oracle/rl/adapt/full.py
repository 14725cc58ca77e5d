"""Everything trains that a checkpoint stores as a floating-point number."""


def reference(stored):
    return {name for name, kind in stored.items() if kind.startswith(("float", "bfloat"))}
