"""Jitted sampling, scoring, terminal chat."""

from configs import check_siblings

check_siblings()
