"""Measures a cell against its peers, in one run, on the same weights, dtype and threads.

A figure counts only beside another from the same run, and only if the outputs agree: `runs` refuses
to report a peer whose logits are not the reference's.
"""

from braid_orchestrator.bench.runs import BenchOptions, decode, prefill
from braid_orchestrator.bench.view import show

__all__ = ["BenchOptions", "decode", "prefill", "show"]
