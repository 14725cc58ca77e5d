"""What every worker shares, whatever its environment: taking turns, and the same random tokens.

The runner starts a worker with its settings as one JSON argument. The worker gets ready and then,
for every line on its standard input, does one round and answers with one line of JSON: the
processor seconds of all its threads, and whatever the runner wants to check. Answers have a pipe of
their own, since libraries print to the standard output.
"""

import json
import os
import sys
import time
from typing import Any

import torch


class Settings:
    """The settings of a worker as attributes: `model`, `threads` and those of its contender."""

    def __init__(self) -> None:
        vars(self).update(json.loads(sys.argv[1]))
        torch.set_num_threads(self.threads)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the runner gave no setting {name!r}")


class Turns:
    """Waits for the runner's word and clocks what follows."""

    def __init__(self, settings: Settings) -> None:
        self.answers = os.fdopen(settings.answers, "w")
        self.started = 0.0

    def wait(self) -> None:
        """Until the runner asks for a round; ends the process where it asks for no more."""
        if not sys.stdin.readline():
            os._exit(0)
        self.started = time.process_time()

    def done(self, **checks: Any) -> None:
        """The round is over: say what it took."""
        seconds = time.process_time() - self.started
        print(json.dumps({"seconds": seconds, **checks}), file=self.answers, flush=True)

    def every(self, steps: int, step: int, **checks: Any) -> None:
        """Called after step 1, 2, ... of an endless training: every `steps` of them are a round."""
        if step % steps == 0:
            self.done(**checks)
            self.wait()


def rows(count: int, length: int, vocabulary: int, *seed: int) -> torch.Tensor:
    """Random tokens [count, length]; equal arguments give equal tokens in every environment."""
    stream = torch.Generator().manual_seed(sum(s * 1000**i for i, s in enumerate(seed)))
    return torch.randint(vocabulary, (count, length), generator=stream)


def documents(count: int, mean: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Random documents whose lengths spread widely around `mean`."""
    stream = torch.Generator().manual_seed(count)
    drawn = torch.empty(count).exponential_(1 / (mean - 16), generator=stream).long() + 16
    lengths = drawn.clamp(max=longest).tolist()
    return [torch.randint(vocabulary, (n,), generator=stream).tolist() for n in lengths]


def matrices(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The weights called `names`, dense and in 32 bits."""
    found = {name.removesuffix(".weight"): value for name, value in model.named_parameters()}
    return {name: found[name].detach().float().contiguous() for name in names}
