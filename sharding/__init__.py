"""Meshes, one rule table, placement. Knows no model."""

from configs import check_siblings

check_siblings()
