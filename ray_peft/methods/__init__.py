"""All methods: those of `single`, and the ensemble of several."""

from typing import Annotated, get_args

from pydantic import Field

from ray_peft.methods.base import Method
from ray_peft.methods.ensemble import Ensemble
from ray_peft.methods.single import SingleMethod

AnyMethod = Annotated[SingleMethod | Ensemble, Field(discriminator="name")]

METHODS: tuple[type[Method], ...] = get_args(get_args(AnyMethod)[0])
"""Every method, in the order in which reports list them."""
