"""Apps: one file, one endpoint, and its YAML beside it."""
