"""What the optional axes of the pretrain stage share: parts of a decoder trained from scratch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import ClassVar

from transformers import PreTrainedModel

from drawplate.core.method import Method
from drawplate.train.distributed import World


class Part(Method):
    """Something of the untrained decoder that is replaced, trained in its place, and then stored.

    Contract: what a part changes between steps lives in parameters or persistent buffers, or is a
    function of the step's number, so that a run goes on exactly where it was stopped.
    """

    sharded: ClassVar[bool] = False
    """Whether it also works where each process holds only some rows of every parameter."""

    @abstractmethod
    def install(self, model: PreTrainedModel, seed: int) -> None:
        """Puts trainable stand-ins into the untrained `model`: a function of it and of `seed`.

        Raises:
            UserError: the model has no such place.
        """

    def before(self, model: PreTrainedModel, step: int) -> None:
        """Called before the gradients of data index `step`, from 0, in every process.

        A function of the model's state and of `step` that writes no parameter and changes nothing
        more when it is called again: a step may be given up half-way and be begun anew.
        """

    def after(self, model: PreTrainedModel, steps: int, seed: int, world: World) -> Collection[str]:
        """Called once when `steps` steps are finished, in every process -> parameters it wrote.

        For what has to happen exactly once a step; a signal does not interrupt it. Afterwards all
        processes of `world` hold equal parameters and buffers. The optimizer takes the parameters
        that are named as they then are, and forgets what it remembered of them.

        A step that the guard skipped counts as well. The model is put into training mode before, at
        which modules that gather something over a step have to forget it.
        """
        return ()

    def finish(self, model: PreTrainedModel) -> None:
        """After training: what only training needed becomes what is stored.

        Plain weights where that is exact, an edit otherwise.
        """
