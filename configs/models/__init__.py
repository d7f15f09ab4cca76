"""Architectures by name: YAML with the keys of a Hugging Face config.json."""
