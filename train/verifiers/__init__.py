"""Built-in rewards: plain batched functions (completions, columns, options) -> a score or None for each."""
