"""Which members train on one base at the same time, and which member follows one that ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ray_peft.engine.member import Member


class Crew(ABC):
    """The members of one base, as they come and go."""

    @abstractmethod
    def seat(self, member: Member, number: int) -> None:
        """A member starts in round `number`; it has been resumed from its last checkpoint."""

    @abstractmethod
    def finished(self, members: Sequence[Member]) -> None:
        """Members have done all their steps, at the same time; each of them leaves next."""

    @abstractmethod
    def leave(self, member: Member, error: Exception | None) -> Member | None:
        """A member has finished, or has failed with `error`; returns the member that takes its place, if there is one.

        Raises:
            Exception: what ends the training of all members.
        """


class Alone(Crew):
    """One member: its failure is that of the training."""

    def seat(self, member: Member, number: int) -> None:
        """It has the base to itself."""

    def finished(self, members: Sequence[Member]) -> None:
        """It is scored later."""

    def leave(self, member: Member, error: Exception | None) -> Member | None:
        """Nobody follows."""
        if error is not None:
            raise error
        return None
