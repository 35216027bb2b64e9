"""One thread per process: the tests' tensors are small, and results must not depend on the number of cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that tests start
