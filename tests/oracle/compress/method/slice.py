"""Ashkboos et al. 2024 on GPT-2, without rotating anything: projectors stand in the full stream.

Deleting all but k rotated directions where a norm reads the stream x is to replace x by Q_k Q_k^T x
there, skip connection included. Q_k are eigenvectors of the moments of what that norm gives before
gain and shift, in the model as it was.
"""

import math

import numpy as np


def norm(x, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def attention(x, w, heads):
    size = x.shape[-1] // heads
    mixed = np.zeros_like(x)
    query, key, value = np.split(x @ w["c_attn.weight"] + w["c_attn.bias"], 3, axis=-1)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for row in range(len(x)):
            for t in range(x.shape[1]):
                scores = key[row, : t + 1, part] @ query[row, t, part] / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                mixed[row, t, part] = weights / weights.sum() @ value[row, : t + 1, part]
    return mixed @ w["c_proj.weight"] + w["c_proj.bias"]


def feed_forward(x, w):
    inner = x @ w["c_fc.weight"] + w["c_fc.bias"]
    gelu = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return gelu @ w["c_proj.weight"] + w["c_proj.bias"]


def below(weights, start):
    return {name[len(start) :]: value for name, value in weights.items() if name.startswith(start)}


def run(weights, tokens, layers, heads, eps, projectors):
    """Logits, and what each norm gave before gain and shift."""
    seen = []

    def read(x, name):
        seen.append(norm(x, eps))
        return seen[-1] * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def kept(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred if projectors is None else centred @ projectors[len(seen)]

    x = kept(weights["wte.weight"][tokens] + weights["wpe.weight"][: tokens.shape[1]])
    for layer in range(layers):
        own = f"h.{layer}."
        x = kept(x + attention(read(x, f"{own}ln_1"), below(weights, f"{own}attn."), heads))
        x = kept(x + feed_forward(read(x, f"{own}ln_2"), below(weights, f"{own}mlp.")))
    return read(x, "ln_f") @ weights["wte.weight"].T, seen


def reference(weights, calibration, tokens, layers, heads, eps, width):
    """Logits of the sliced model on `tokens`; `weights` by their names in GPT2Model."""
    _, seen = run(weights, calibration, layers, heads, eps, None)
    projectors = []
    for output in seen:
        rows = output.reshape(-1, output.shape[-1])
        _, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
        projectors.append(vectors[:, -width:] @ vectors[:, -width:].T)
    return run(weights, tokens, layers, heads, eps, projectors)[0]
