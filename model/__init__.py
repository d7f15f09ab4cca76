"""The transformer, weight nodes, tree surgery."""

from configs import check_siblings

check_siblings()
