"""Pure losses: (params, batch, norms) -> (total, metrics)."""
