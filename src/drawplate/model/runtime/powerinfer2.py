"""PowerInfer-2: clusters of ReLU neurons, hot ones in memory, cold ones read when they fire.

Of y = sum over neurons i of act(g_i) (up_i x) down_i, with g = gate x and act 0 below 0, a token
needs only the neurons with g_i > 0, and for ReLU the resident gate says exactly which these are.
Neighbouring neurons form clusters, each one piece of a file. Those that fire most often on a text
stay in memory, others are read on demand through a cache that drops what was used longest ago,
under one cap. A prompt is computed densely: every cluster is read once and none is cached. While
the resident clusters are multiplied, a thread reads.

Paper: Xue et al. 2024, PowerInfer-2: Fast Large Language Model Inference on a Smartphone,
arXiv:2406.06282, section 4.
Deviation: the gate itself instead of a trained predictor, hence exact; no NPU; the clusters are
those of the file rather than of a step; the cache is one over all layers. The whole model is loaded
before its matrices are moved to files, so that a model larger than memory cannot start.
Cost: a copy of all up and down matrices in the folder for temporary files; in memory, `memory`.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from drawplate.model.runtime import Figures, Runtime, Stack, reroute
from drawplate.model.runtime._anatomy import feed_forwards, zero_below_zero
from drawplate.model.runtime._clusters import Neurons
from drawplate.model.runtime._firing import Phase, rates
from drawplate.model.runtime._streamed import Streamed


class PowerInfer2(Runtime):
    """Keeps a part of the feed-forward in memory; exact up to the rounding of sums."""

    name: Literal["powerinfer2"] = "powerinfer2"
    paper: ClassVar[str] = "2406.06282"

    cluster: PositiveInt = 8
    """Neighbouring neurons that are read together; all are read where any of them fires."""
    memory: PositiveInt = 1 << 26
    """Most bytes of up and down matrices in memory, those on their way from the file included."""
    hot: float = Field(0.5, ge=0, le=1)
    """Share of that memory for the clusters that fire most often; the rest is the cache."""
    ahead: PositiveInt = 2
    """Clusters that are being read while others are multiplied."""

    def unfit(self, model: Any) -> str | None:
        """Every feed-forward part has to be ReLU-sparse and made of plain linear layers."""
        parts, kind = feed_forwards(model), type(model).__name__
        if not parts:
            return f"{kind} has no feed-forward part that it knows (of Llama, Mistral, Qwen, OPT)"
        for part in parts:
            if not zero_below_zero(part.act):
                return (
                    f"{kind} has the activation {type(part.act).__name__}, under which every "
                    "neuron fires always; train with model.activation relu or relu2"
                )
            for layer in filter(None, (part.up, part.down)):
                if type(layer) is not nn.Linear:
                    return f"{kind} has a {type(layer).__name__}; only plain matrices are streamed"
        return None

    def attach(self, model: Any, text: Tensor, stack: Stack) -> Figures:
        """Moves up and down matrices into files, and the hot clusters back; undone at the end."""
        parts = feed_forwards(model)
        counts = rates(model, [part.gate for part in parts], self.cluster, text)
        neurons = stack.enter_context(Neurons(self.memory, self.ahead))
        phase = Phase(model, stack)
        streamed = [Streamed(part, neurons, self.cluster, stack) for part in parts]
        for each, hot in zip(streamed, neurons.settle(counts, self.hot), strict=True):
            each.settle(hot)
            reroute(stack, each.part.host, partial(self._answer, each, phase), self.name)
        return neurons.figures

    def feed_forward(
        self, x: Tensor | None, act: Tensor, bias: Tensor | None, pieces: Iterable[Any]
    ) -> Tensor:
        """Sum over pieces (columns, neurons [n, P, hidden]) of (act * (up x + bias)) down.

        x [N, hidden], act [N, F] -> [N, hidden]; without x, up x + bias is 1.
        """
        total: Any = 0
        for columns, neurons in pieces:
            weight, neurons = act[:, columns], neurons.to(act.dtype)
            if x is not None:
                own = None if bias is None else bias[columns].to(x.dtype)
                weight = weight * nn.functional.linear(x, neurons[:, 0], own)
            wide = torch.promote_types(act.dtype, torch.float32)
            total = total + (weight @ neurons[:, -1]).to(wide)
        return total.to(act.dtype)  # type: ignore[no-any-return]

    def _answer(self, streamed: Streamed, phase: Phase, x: Tensor) -> Tensor:
        part, flat = streamed.part, x.reshape(-1, x.shape[-1])
        pieces = partial(streamed.pieces, all_of_them=phase.reading)
        if part.up is None:
            y = self.feed_forward(None, flat, None, pieces(flat))
        else:
            act = part.act(part.gate(flat))
            y = self.feed_forward(flat, act, part.up.bias, pieces(act))
        y = y if part.down.bias is None else y + part.down.bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1)
