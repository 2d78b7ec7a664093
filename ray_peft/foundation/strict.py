"""The base of every spec: strict, frozen, closed to unknown keys."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A value that fails on a typing error and cannot be edited later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """Validate plain JSON-like data: lists become tuples, and "3" is still not 3.

        Raises:
            pydantic.ValidationError: the data does not fit.
        """
        import json

        return cls.model_validate_json(json.dumps(plain))

    def plain(self) -> dict[str, Any]:
        """The value as JSON-like data; `from_plain` gives an equal value back."""
        return self.model_dump(mode="json")
