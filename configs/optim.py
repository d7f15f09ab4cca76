"""Knobs of the optimizer and of its learning rate."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.section import Int, Section, Strings, Text, knob


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "lion", "adafactor", "muon", "schedule_free"] = knob(
        "adamw", "optimizer; muon: for the matrices of layers, adamw for the rest; schedule_free: adamw"
    )
    learning_rate: float = knob(2e-5, "peak learning rate", "a step needs a direction; freeze with tune", gt=0)
    rates: dict[Text, Annotated[float, Field(ge=0)]] = knob(
        {}, "path pattern -> factor of the learning rate for those weights; the last that matches counts"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = knob(
        "linear", "shape after warmup; wsd: constant, then down in the last steps"
    )
    decay_ratio: float = knob(0.1, "wsd: share of all steps in which the rate goes down", "a share", gt=0, le=1)
    decay_shape: Literal["linear", "sqrt", "cosine"] = knob("sqrt", "wsd: how it goes down; sqrt: 1 - sqrt(share done)")
    warmup_steps: Int = knob(0, "optimizer steps of linear warmup", "a count of steps", ge=0)
    warmup_ratio: float = knob(0.0, "warmup as a share of all steps", "a share", ge=0, le=1)
    final_ratio: float = knob(0.0, "last learning rate / peak, for linear, cosine and wsd", "a share", ge=0, le=1)
    weight_decay: float = knob(0.0, "decoupled weight decay (times the learning rate)", "less would grow weights", ge=0)
    decay_patterns: Strings = knob(
        ("*weight*",), "path patterns of the weights that decay; default: matrices and embeddings, not norms or biases"
    )
    b1: float = knob(0.9, "decay of the first moment", "1 would never forget", ge=0, lt=1)
    b2: Annotated[float, Field(ge=0, lt=1)] | None = knob(
        None, "decay of the second moment; null: 0.999, of lion 0.99", "1 would never forget"
    )
    momentum: float = knob(0.95, "muon: decay of the gradients' average", "1 would never forget", ge=0, lt=1)
    eps: float = knob(1e-8, "added to the root of the second moment", "keeps a zero gradient from dividing by 0", gt=0)
    max_grad_norm: Annotated[float, Field(gt=0)] | None = knob(
        1.0, "clip the global gradient norm to this; null = off", "0 would stop learning: null switches clipping off"
    )
    state_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of the first moment")
    offload: bool = knob(False, "keep the optimizer's state in the host's memory; it visits the device in each update")
    reduce_dtype: Literal["float32", "compute"] = knob(
        "float32", "dtype in which weight gradients are made and added up over devices: as the weights, or model.dtype"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = knob(
        None, "keep a moving average of the weights, evaluate and export it; null: none", "0 and 1 average nothing"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"optim.warmup_steps is {self.warmup_steps} and optim.warmup_ratio is {self.warmup_ratio}: "
                "give one of them, they say the same thing"
            )
        if self.name == "schedule_free":
            for key, good in (("schedule", "constant"), ("ema_decay", None), ("state_dtype", "float32")):
                if (given := getattr(self, key)) != good:
                    raise ValueError(
                        f"optim.name is schedule_free and optim.{key} is {given}: it averages the weights itself, at a "
                        f"constant rate; set optim.{key}={'null' if good is None else good}"
                    )
        return self
