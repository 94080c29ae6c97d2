"""Everything that only a GPU can show, in one command.

    python benchmarks/gpu_check.py [--only NAME] [--out DIR]

Takes less than eight minutes, fetches nothing, and writes gpu-check.json and gpu-check.md to
benchmarks/results. On a machine without a CUDA device it says so and exits with 3.
"""

from __future__ import annotations

from braid_orchestrator.bench.gpu.__main__ import main

if __name__ == "__main__":
    main(prog_name="gpu-check")
