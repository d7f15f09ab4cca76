"""YAML recipes, one per job."""
