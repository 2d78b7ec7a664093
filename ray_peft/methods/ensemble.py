"""Ensemble: finished trials answer together, each next token from the weighted mean of their distributions."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ray_peft.foundation.strict import Strict
from ray_peft.methods.base import Dtype, Method, Quantization, Stage, Task
from ray_peft.methods.single import SingleMethod


class Member(Strict):
    """One model of an ensemble: the ensemble's own trial with this method, which a sweep trains first."""

    method: Annotated[SingleMethod, Field(discriminator="name")]
    model: str | None = None
    """Repository id or folder of another base with the same tokenizer; None takes the trial's."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Another seed than the trial's."""


class Ensemble(Method):
    """p(next token) = sum of weight x p of each member, the weights tuned on the validation rows.

    A linear mixture of distributions (Jacobs et al. 1991, doi:10.1162/neco.1991.3.1.79); its weights have one best
    point, which expectation maximisation finds. With two members the first weight is the studies' alpha.
    """

    name: Literal["ensemble"] = "ensemble"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft"})
    members: tuple[Member, ...]
    """At least two."""

    @field_validator("members")
    @classmethod
    def _several(cls, members: tuple[Member, ...]) -> tuple[Member, ...]:
        # Not min_length, which pydantic 2.14 also measures after wrong members are gone.
        if len(members) < 2:
            raise ValueError(f"an ensemble needs at least two members (found {len(members)})")
        return members

    def arithmetic(self, dtype: Dtype, four_bit_share: float | None = None, storage: Quantization | None = None) -> str:
        """Of the members, which differ."""
        return "that of each member"

    def stages(self, steps: int) -> list[tuple[Stage, int]]:
        """No stages: the members are trained as trials of their own."""
        return []

    def conflicts(self, *, accumulates: bool, num_workers: int) -> list[str]:
        """The members check themselves; the ensemble answers in one process."""
        if num_workers == 1:
            return []
        return [
            f"an ensemble and its members run on one worker each (found resources.num_workers: {num_workers}); use "
            "num_workers: 1"
        ]
