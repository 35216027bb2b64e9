"""Speed and memory as ratios against a reference that runs in the same breath. `python -m elara.bench`."""
