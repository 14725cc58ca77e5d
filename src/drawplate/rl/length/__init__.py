"""Axis: the token limit of the answers over the course of training."""

from abc import abstractmethod

from drawplate.core.method import Method


class Length(Method):
    """Contract: a whole number of at least one, and a function of its arguments alone."""

    @abstractmethod
    def limit(self, step: int, steps: int) -> int:
        """Most tokens of an answer in optimizer step `step` of `steps`."""
