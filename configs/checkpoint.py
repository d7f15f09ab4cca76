"""Saving, and what is done when something fails."""

from typing import Literal, Self

from pydantic import model_validator

from configs.section import Int, Section, Text, knob


class Checkpoint(Section):
    """Saving, so that the same command resumes."""

    enabled: bool = knob(True, "save at all")
    format: Literal["safetensors", "orbax"] = knob(
        "safetensors", "files of a checkpoint: safetensors and JSON, or orbax's; a run goes on in its own"
    )
    every: Int = knob(100, "steps between saves", "a count of steps; enabled=false switches saving off", ge=1)
    keep: Int = knob(2, "newest checkpoints kept", "resuming needs one", ge=1)
    keep_best: Text | None = knob(None, "metric of evaluations (eval_loss) whose best checkpoint is saved and kept too")
    best: Literal["lowest", "highest"] = knob("lowest", "which value of keep_best is best")
    local: Text | None = knob(None, "folder on each host's own disk: saved to more often than the run's folder")
    local_every: Int = knob(10, "steps between saves to checkpoint.local", "a count of steps", ge=1)
    remote: Text | None = knob(None, "URL (gs://.., s3://..) that each checkpoint is copied to, and resumed from")
    on_error: Literal["continue", "stop"] = knob("continue", "when a save fails, as by a full disk")
    deadline: float = knob(30.0, "seconds after SIGTERM in which the last save should be done; told if it is not", gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("keep_best", "local", "remote"):
            if self.format == "orbax" and (given := getattr(self, key)) is not None:
                raise ValueError(f"checkpoint.format is orbax and checkpoint.{key} is {given}: that is for safetensors")
        return self
