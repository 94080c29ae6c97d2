"""Makes the checkpoints of the body tests known here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).resolve().parent.parent / "bodies"))

import torch

# Small matrices on shared cores: more threads only wait for one another.
torch.set_num_threads(1)
