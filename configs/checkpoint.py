"""Saving, and what is done when something fails."""

from configs.section import Int, Section, knob


class Checkpoint(Section):
    """Saving, so that the same command resumes."""

    enabled: bool = knob(True, "save at all")
    every: Int = knob(100, "steps between saves", "a count of steps; enabled=false switches saving off", ge=1)
    keep: Int = knob(2, "newest checkpoints kept", "resuming needs one", ge=1)
