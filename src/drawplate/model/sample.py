"""The one sampler, for training rollouts and for evaluation alike.

Rows are decoded together, at most `batch_size` at a time; a finished row leaves at once and its
place goes to a prompt that waits, so that no work is spent on what is finished. Equal prompts that
enter together are read once. A drawn token is a function of the seed, the row's index, the token's
position and the model's probabilities: neither the other rows nor the batch size have a say in it,
except for the rounding of sums. A model with CLEX is the exception: the longest row that a call may
come to decides on the frequencies of all, so that keys once stored stay right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drawplate.core.errors import NotFinite, UserError
from drawplate.core.products import swift
from drawplate.core.progress import Watch, silent
from drawplate.core.seeds import seed_of
from drawplate.edits.clex import reaching
from drawplate.model.decoder import decoder
from drawplate.model.filter import TokenFilter
from drawplate.model.flight import Flight
from drawplate.model.philox import uniforms


@dataclass(frozen=True)
class Samples:
    """What was drawn for each prompt, in the order of the prompts."""

    tokens: list[list[int]]
    """The drawn tokens; the last one is `end` where the row ended by itself."""
    logprobs: list[list[float]]
    """Of each token, its log-probability in nats under the model: temperature 1, nothing filtered.

    This is what a full forward pass over prompt and answer gives, hence what a loss recomputes:
    with CLEX, one inside `reaching` the longest row that the call may come to.
    """
    behaviour: list[list[float]]
    """Of each token, its log-probability in nats under the distribution that it was drawn from.

    That is after temperature and filters: 0 at temperature 0, and equal to `logprobs` at
    temperature 1 without filters.
    """
    finished: list[bool]
    """Whether the row ended by itself, rather than being cut off after `max_new` tokens."""


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int | Sequence[int],
    end: int,
    temperature: float = 1.0,
    filters: Sequence[TokenFilter] = (),
    seed: int | tuple[int | str, ...] = 0,
    first: int | Sequence[int] = 0,
    begun: Sequence[int] = (),
    batch_size: int = 128,
    precision: torch.dtype | None = None,
    watch: Watch = silent,
) -> Samples:
    """Continue each prompt by tokens drawn from softmax(logits / temperature), until `end`.

    Args:
        model: A Hugging Face decoder, dense or edited. Used in eval mode and without gradients; the
            modes of its modules are put back afterwards.
        prompts: Token ids, at least one per prompt; lengths may differ. Repeat a prompt to draw
            several answers, side by side so that it is read once.
        max_new: Most tokens per answer, or of each answer.
        end: The token that ends an answer.
        temperature: 0 takes the likeliest token instead of drawing.
        filters: Applied in turn, after the temperature.
        seed: With the row's index and the token's position, all that chance depends on.
        first: Index of the first row, where the prompts are a part of a longer list, or of each.
        begun: Of each prompt, how many tokens at its end an earlier call drew under the same index:
            chance goes on as if that call had not stopped.
        batch_size: Most rows in flight: memory against speed, without influence on the result.
        precision: In which dtype plain linear layers multiply, from copies of their weights that
            last as long as the call; None is the model's own, without copies, which takes longer.
            Half precision is faster, and moves the probabilities away from those that training in
            the model's own dtype computes.
        watch: Called after every step with the rows that are done, all rows, and as metrics the
            tokens drawn so far and the rows in flight.

    Raises:
        UserError: Arguments that cannot work: empty prompts, unknown tokens, too little context.
        NotFinite: The model gave no usable logits.
    """
    samples = Samples(
        [[] for _ in prompts], [[] for _ in prompts], [[] for _ in prompts], [False] * len(prompts)
    )
    if not prompts:
        return samples
    many = len(prompts)
    most = [max_new] * many if isinstance(max_new, int) else list(max_new)
    index = list(range(first, first + many)) if isinstance(first, int) else list(first)
    before = list(begun) or [0] * many
    _check(model, prompts, most, temperature, batch_size)
    key = seed_of(*seed) if isinstance(seed, tuple) else seed_of(seed)
    horizon = max(map(len, prompts)) + max(most)
    places = min(batch_size, len(prompts))
    entered = drawn = 0
    decode = decoder(model, horizon, precision)
    with torch.no_grad(), _evaluating(model), swift(model, precision), reaching(model, horizon):
        flight = Flight(decode, prompts, places, max(most))
        while flight.rows or entered < len(prompts):
            # Prompts are read several at a time: a few free places wait for others to become free.
            enter = min(places - len(flight.rows), len(prompts) - entered)
            if enter and enter >= min(places // 8, len(prompts) - entered):
                flight.enter(range(entered, entered + enter))
                entered += enter
            rows = flight.rows
            positions = [before[row] + len(samples.tokens[row]) for row in rows]
            chance = torch.from_numpy(uniforms(key, [index[row] for row in rows], positions))
            token, own, behaviour = draw(flight.step(), chance, temperature, filters)
            columns = token.tolist(), own.tolist(), behaviour.tolist()
            for row, drawn_token, logprob, chosen in zip(rows, *columns, strict=True):
                samples.tokens[row].append(drawn_token)
                samples.logprobs[row].append(logprob)
                samples.behaviour[row].append(chosen)
                samples.finished[row] = drawn_token == end
            drawn += len(rows)
            flight.go_on(
                token,
                [not samples.finished[r] and len(samples.tokens[r]) < most[r] for r in rows],
            )
            watch(
                entered - len(flight.rows),
                len(prompts),
                {"tokens": float(drawn), "rows": float(len(flight.rows))},
            )
    return samples


def draw(
    logits: Tensor, chance: Tensor, temperature: float, filters: Sequence[TokenFilter]
) -> tuple[Tensor, Tensor, Tensor]:
    """The first token up to which the probabilities sum to more than `chance`.

    Logits [N, V] and numbers in [0, 1) [N] -> tokens, their log-probabilities under
    softmax(logits), and those under the distribution after temperature and filters, each [N]. At
    temperature 0 the likeliest token, with certainty.

    Raises:
        NotFinite: A row holds NaN or plus infinity, or nothing but minus infinity.
    """
    if not logits.amax(-1).isfinite().all():
        raise NotFinite("sampling: the model gave logits that are not finite; look at its weights")
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        own = logits.log_softmax(-1).gather(-1, token)[:, 0]
        return token[:, 0], own, torch.zeros_like(own)
    tempered = logits if temperature == 1 else logits / temperature
    for each in filters:
        tempered = tempered.masked_fill(~each.keep(tempered), -torch.inf)
    probability = tempered.softmax(-1)
    upto = probability.cumsum(-1, dtype=torch.float64)
    # Strictly more than, so that no token of probability 0 is ever drawn.
    token = torch.searchsorted(upto, chance.to(upto.device)[:, None] * upto[:, -1:], right=True)
    behaviour = probability.gather(-1, token).log()
    own = behaviour if tempered is logits else logits.log_softmax(-1).gather(-1, token)
    return token[:, 0], own[:, 0], behaviour[:, 0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards each module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    temperature: float,
    batch_size: int,
) -> None:
    if min(most) < 1 or batch_size < 1:
        raise UserError(
            f"sampling: max_new={min(most)} and batch_size={batch_size} must both be at least 1"
        )
    if not (isfinite(temperature) and temperature >= 0):
        raise UserError(f"sampling: temperature={temperature} must be finite and at least 0")
    vocabulary = model.get_input_embeddings().num_embeddings
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"sampling: prompt {row} is empty; it needs at least one token")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocabulary:
                raise UserError(
                    f"sampling: prompt {row} holds token {token}, the model knows 0 to "
                    f"{vocabulary - 1}; was it encoded by another tokenizer?"
                )
    check_context(model, prompts, most)


def check_context(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], most: Sequence[int]
) -> None:
    """That prompts with at most so many new tokens each fit into the model's context.

    Raises:
        UserError: one of them does not.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    longest, new = max(
        ((len(prompt), more) for prompt, more in zip(prompts, most, strict=True)), key=sum
    )
    if context is not None and longest + new - 1 > context:
        raise UserError(
            f"sampling: a prompt of {longest} tokens and max_new={new} need a context of "
            f"{longest + new - 1}, the model has {context}; shorten one of them"
        )
