"""Two threads at most: the tests' shapes are tiny, and more threads only get in each other's way."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
