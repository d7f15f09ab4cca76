"""Saving, and what is done when something fails."""

from typing import Literal

from configs.section import Int, Section, Text, knob


class Checkpoint(Section):
    """Saving, so that the same command resumes."""

    enabled: bool = knob(True, "save at all")
    every: Int = knob(100, "steps between saves", "a count of steps; enabled=false switches saving off", ge=1)
    keep: Int = knob(2, "newest checkpoints kept", "resuming needs one", ge=1)
    keep_best: Text | None = knob(None, "metric of evaluations (eval_loss) whose best checkpoint is saved and kept too")
    best: Literal["lowest", "highest"] = knob("lowest", "which value of keep_best is best")
    local: Text | None = knob(None, "folder on each host's own disk: saved to more often than the run's folder")
    local_every: Int = knob(10, "steps between saves to checkpoint.local", "a count of steps", ge=1)
    remote: Text | None = knob(None, "URL (gs://.., s3://..) that each checkpoint is copied to, and resumed from")
    on_error: Literal["continue", "stop"] = knob("continue", "when a save fails, as by a full disk")
    deadline: float = knob(30.0, "seconds after SIGTERM in which the last save should be done; told if it is not", gt=0)
