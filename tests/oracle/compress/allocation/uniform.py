"""Equal shares: as long as anything fits, the layer with the smallest share takes its next step."""


def reference(layers, budget):
    chosen = [0] * len(layers)
    left = budget - sum(layer["bytes"][0] for layer in layers)
    open_ = set(range(len(layers)))
    while open_:
        i = min(open_, key=lambda i: (layers[i]["bytes"][chosen[i]] / layers[i]["bytes"][-1], i))
        sizes = layers[i]["bytes"]
        if chosen[i] + 1 < len(sizes) and sizes[chosen[i] + 1] - sizes[chosen[i]] <= left:
            left -= sizes[chosen[i] + 1] - sizes[chosen[i]]
            chosen[i] += 1
        else:
            open_.remove(i)
    return chosen


def prices(layers):
    return [[-size / layer["bytes"][-1] for size in layer["bytes"][:-1]] for layer in layers]
