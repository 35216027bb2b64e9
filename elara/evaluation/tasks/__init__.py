"""Small tasks for lm-eval that need no network: YAML and JSON lines, made by `build`, read by `items`."""
