"""Who trains on one base at once, and who takes the place of a member that ends."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ray_peft.engine.member import Member


class Crew(ABC):
    """The members of one base, as they come and go."""

    @abstractmethod
    def seat(self, member: Member, number: int) -> None:
        """A member, which is where its checkpoint left it, takes part from round `number` on."""

    @abstractmethod
    def leave(self, member: Member, error: Exception | None) -> Member | None:
        """A member is done, or has failed with `error`; returns who takes its place, if anybody does.

        Raises:
            Exception: what ends the training of all members.
        """


class Alone(Crew):
    """One member: its failure is that of the training."""

    def seat(self, member: Member, number: int) -> None:
        """It has the base to itself."""

    def leave(self, member: Member, error: Exception | None) -> Member | None:
        """Nobody follows."""
        if error is not None:
            raise error
        return None
