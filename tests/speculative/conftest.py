"""The helpers of the body tests: random small checkpoints and cells on them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bodies"))

# Small matrices on shared cores: more threads only wait for one another.
torch.set_num_threads(1)
