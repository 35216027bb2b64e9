"""Many runs that answer one question: a search for the best settings, and Hydra's multirun.

`python -m elara.sweep` starts `elara.train` once per trial; nothing here trains in its own process.
"""
