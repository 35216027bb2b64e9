"""How good a model is: loss per byte, drafts, precisions, speed, tasks. A library; `elara.evaluate` is thin."""
