"""Devices, and what is cut along which."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from configs.section import Int, Section, knob
from configs.section import several as _several

AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")
Axis = Literal["data", "fsdp", "tensor", "context", "expert", "stage"]


def _rules(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: () if axes is None else _several(axes) for key, axes in value.items()}


class Mesh(Section):
    """How many devices along each axis, and which logical axis is cut along which."""

    data: Int = knob(1, "devices with replicated weights and different rows; -1 = the rest")
    fsdp: Int = knob(-1, "devices that share weights and optimizer state and take different rows; -1 = the rest")
    tensor: Int = knob(1, "devices that share each matrix product; -1 = the rest")
    context: Int = knob(1, "devices that share each sequence; -1 = the rest")
    expert: Int = knob(1, "devices that share the experts; -1 = the rest")
    stage: Int = knob(1, "pipeline stages, each with its part of the layers; -1 = the rest")
    auto: bool = knob(
        False, "choose the axes left at their default by devices, model and data; in a recipe also `mesh: auto`"
    )
    dcn: dict[Axis, Int] = knob(
        {}, "how much of an axis lies across slices (TPU) or hosts (GPU), over the slower network: {data: 2}"
    )
    pipeline_microbatches: Annotated[Int, Field(ge=1)] | None = knob(
        None, "stage > 1: parts of a micro-batch in the pipeline, a multiple of stage; null: 2 x stage if they divide",
        "a pipeline has something in it",
    )  # fmt: skip
    pipeline_repeats: Int = knob(
        1, "stage > 1: times each part comes by a stage, which then has so many shorter pieces: a smaller bubble, more "
        "exchange", "a count", ge=1,
    )  # fmt: skip
    pipeline_gather: Literal["tick", "step"] = knob(
        "tick", "stage > 1: fetch weights that fsdp splits for every micro-batch, or once a step: less traffic, but a "
        "stage's weights and gradients are whole on a device",
    )  # fmt: skip
    preset: Literal["fsdp", "replicated"] = knob("fsdp", "the table logical axis -> mesh axes to start from")
    rules: Annotated[dict[str, tuple[Axis, ...]], BeforeValidator(_rules)] = knob(
        {}, "changes to the preset's table: logical axis -> mesh axis, list of them, or null for replicated"
    )

    @property
    def shape(self) -> dict[str, int]:
        """Axis -> size; one of them may still be -1."""
        return {axis: getattr(self, axis) for axis in AXES}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for axis, size in self.shape.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis} is {size}, allowed: 1 or more, or -1 for the rest of the devices")
        for axis, size in self.dcn.items():
            if size < 1:
                raise ValueError(f"mesh.dcn.{axis} is {size}, allowed: 1 or more, a divisor of mesh.{axis}")
        if self.stage == 1 and (self.pipeline_microbatches or self.pipeline_repeats > 1) and not self.auto:
            raise ValueError("mesh.pipeline_* is given and mesh.stage is 1: without stages there is no pipeline")
        open_axes = [f"mesh.{axis}" for axis, size in self.shape.items() if size == -1]
        if len(open_axes) > 1:
            raise ValueError(
                f"{' and '.join(open_axes)} are -1, but one axis takes the rest of the devices: set the others to 1"
            )
        return self
