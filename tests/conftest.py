"""The suite runs in two processes (pytest-xdist): a thread for each is faster than two that wait for each other."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; programs that tests start inherit it
