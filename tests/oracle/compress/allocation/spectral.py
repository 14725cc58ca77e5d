"""Error that the next step takes off, for a byte of it, over a power of the layer's energy."""


def reference(layers, relative=0.75):
    result = []
    for layer in layers:
        prices = []
        for step in range(len(layer["bytes"]) - 1):
            less = layer["error"][step] - layer["error"][step + 1]
            cost = layer["bytes"][step + 1] - layer["bytes"][step]
            prices.append(less / cost / layer["energy"] ** relative)
        result.append(prices)
    return result
