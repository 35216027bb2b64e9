"""Elara: a language model of experts, recursion and diffusion drafting, and the framework that trains it."""

import os

# torch's threads wait for each other at every operation: beside one other busy process, spinning as long as they do by
# default made a step 5 times slower on two cores. Read when torch is loaded, so it stands before everything else.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Above all of its levels: torch's profiler would tell of its stages on stderr. Read when torch is loaded, too.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
