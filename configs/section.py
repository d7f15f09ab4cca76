"""What sections of the schema are made of: frozen groups of knobs, each with its meaning and its limits."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: Any) -> Any:
    # `train.steps=1e3` is a float in YAML; the user means 1000.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def several(value: Any) -> Any:
    """One text, or a list, as a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Int = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, Field(min_length=1)]
Strings = Annotated[tuple[Text, ...], BeforeValidator(several)]


def knob(default: Any, meaning: str, why: str = "", **limits: Any) -> Any:
    """A field with its meaning, its limits and the reason for them (shown when a value is refused)."""
    return Field(default, description=meaning, json_schema_extra={"why": why} if why else None, **limits)


class Section(BaseModel):
    """A frozen group of knobs: unknown keys, wrong types, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)
