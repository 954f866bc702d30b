"""What every part of a spec is built of: strict models, and numbers that some library below can count with."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class SpecModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        """Python takes `true` for 1, and YAML `yes` and `on` for `true`. (As a validator of fields, pydantic would not have
        it on a union's `type`.)"""
        given = data if isinstance(data, dict) else {}
        wrong = [
            InitErrorDetails(type=_TRUTH, loc=(name,), input=value)
            for name, value in given.items()
            if name in cls.model_fields and not _takes_truth(cls.model_fields[name].annotation) and _holds_truth(value)
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return data


_TRUTH = PydanticCustomError("truth_value", "a truth value stands where none can be")


def _takes_truth(annotation: Any) -> bool:
    return annotation is bool or any(_takes_truth(part) for part in get_args(annotation))


def _holds_truth(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(isinstance(one, bool) for one in value))


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
"""Far above any use, and within what every library below counts with."""
