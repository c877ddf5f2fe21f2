"""Benchmarks: programs to run from a clone, ``python -m bench.<name> MODEL_DIR``. They use public doors alone."""

import os

# As in the server's worker; read by the libraries when they are loaded, so before anything else.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("MALLOC_ARENA_MAX", "2")
