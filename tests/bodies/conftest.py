"""Fixtures of the body tests."""

from __future__ import annotations

import torch

# Small matrices on shared cores: more threads only wait for one another.
torch.set_num_threads(1)
