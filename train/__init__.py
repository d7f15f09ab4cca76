"""Losses, the one step, the loop, checkpoints, the command line."""

from configs import check_siblings

check_siblings()
