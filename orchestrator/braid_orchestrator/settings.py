"""How a cell is set up, in words that a command line can carry.

Nothing here imports torch: a command that only starts or asks processes must be quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from braid_wire.errors import ConfigInvalid, RequestInvalid
from braid_wire.layers import Kind

from braid_orchestrator.layer_plan import DTYPE_BYTES, ModelPlans, build_plans, load_config
from braid_orchestrator.layer_plan.sizes import plan_memory

if TYPE_CHECKING:
    from braid_orchestrator.cell import CellOptions

DTYPES = ("float32", "bfloat16", "auto")
STATE_DTYPES = ("float32", "bfloat16")
SEGMENTS = ("auto", "native", "inductor", "cudagraph", "eager", "off")
OVERLAPS = ("auto", "on", "off")
DISPATCHES = ("walk", "rpc")
MOST_GUESSES = 16
"""Most tokens that a draft guesses ahead."""
PLACEMENTS = ("process", "embedded")

# Slots are sized for this many sequences of one step at most; more of them take turns.
_MOST_SEQUENCES = 256

_UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


@dataclass(frozen=True)
class Settings:
    """A model and how a cell holds it; the defaults are those of every command."""

    model: Path
    dtype: str = "float32"
    """Of weights, activations and pages; "auto" is the checkpoint's own."""
    state_dtype: str = "float32"
    device: str = "cpu"
    """Of every process: "cpu", "cuda" or "cuda:N"."""
    dispatch: str = "walk"
    max_tokens: int = 2048
    max_sequences: int = 64
    max_context: int = 4096
    page_size: int = 16
    pool_bytes: int = 1 << 30
    threads: int = 0
    """Of each process; 0: $OMP_NUM_THREADS, else one for each core."""
    trust_remote_code: bool = False
    segments: str = "auto"
    overlap: str = "auto"
    prefix_cache: bool = True
    max_waiting: int = 1024
    speculative: int = 0
    """Tokens that the model's draft guesses ahead of each request; 0: none."""
    speculative_adaptive: bool = True
    """Whether fewer are guessed, or none, where that has shown to be faster."""

    def arguments(self) -> list[str]:
        """The same as options of `python -m braid_orchestrator`."""
        given = {
            "--model": self.model,
            "--dtype": self.dtype,
            "--state-dtype": self.state_dtype,
            "--device": self.device,
            "--dispatch": self.dispatch,
            "--max-tokens": self.max_tokens,
            "--max-sequences": self.max_sequences,
            "--max-context": self.max_context,
            "--page-size": self.page_size,
            "--pool-bytes": self.pool_bytes,
            "--threads": self.threads,
            "--segments": self.segments,
            "--overlap": self.overlap,
            "--max-waiting": self.max_waiting,
            "--speculative": self.speculative,
        }
        arguments = [str(word) for pair in given.items() for word in pair]
        arguments.append("--prefix-cache" if self.prefix_cache else "--no-prefix-cache")
        arguments.append("--speculative-adaptive" if self.speculative_adaptive else "--speculative-fixed")
        return [*arguments, "--trust-remote-code"] if self.trust_remote_code else arguments

    def plans(self) -> ModelPlans:
        """The layer plans of the model.

        Raises:
            ConfigInvalid: the directory holds no model that is known.
        """
        if not self.model.is_dir():
            raise ConfigInvalid(f"{self.model} is not a directory with a model", field="model")
        return build_plans(load_config(self.model))

    def cell_options(self) -> CellOptions:
        """For `Cell`; imports torch.

        Raises:
            ConfigInvalid: a limit is below 1, or the model's config cannot be read.
        """
        import torch
        from braid_wire.devices import device_of

        from braid_orchestrator.cell import CellOptions
        from braid_orchestrator.dispatch import Dispatch
        from braid_orchestrator.overlap import OverlapMode
        from braid_orchestrator.store import Limits

        name = self.plans().dtype if self.dtype == "auto" else self.dtype
        return CellOptions(
            dtype=getattr(torch, name),
            state_dtype=getattr(torch, self.state_dtype),
            device=device_of(self.device),
            dispatch=Dispatch(self.dispatch),
            limits=Limits(
                max_tokens=self.max_tokens,
                max_sequences=self.max_sequences,
                max_context=self.max_context,
                page_size=self.page_size,
                pool_bytes=self.pool_bytes,
            ),
            trust_remote_code=self.trust_remote_code,
            segments=self.segments,
            overlap=OverlapMode(self.overlap),
            prefix_cache=self.prefix_cache,
            max_waiting=self.max_waiting,
            speculative=self.speculative,
            speculative_adaptive=self.speculative_adaptive,
        )

    def raised_for(self, lengths: list[int]) -> Settings:
        """Limits raised, never lowered, so that sequences of these lengths fit side by side."""
        context = max(self.max_context, *lengths)
        sequences = max(self.max_sequences, min(len(lengths), _MOST_SEQUENCES))
        grown = replace(self, max_context=context, max_sequences=sequences)
        return replace(grown, pool_bytes=max(self.pool_bytes, grown.bytes_for(lengths)))

    def bytes_for(self, lengths: list[int]) -> int:
        """Pages of these sequences, or of one of full length, and the slots of all."""
        plans = self.plans()
        itemsize = DTYPE_BYTES[plans.dtype if self.dtype == "auto" else self.dtype]
        roles = [plans.target] if plans.draft is None else [plans.target, plans.draft]
        units = [plan_memory(plan, self.page_size, itemsize) for plan in roles]
        pages = max(sum(self._pages(length) for length in lengths), self._pages(self.max_context))
        # Every sequence reads one slot and writes another, and one more for every guess; one hands over
        # between two lanes.
        slots = (2 + self.speculative) * self.max_sequences + 1
        return sum(page.kv_bytes * pages + page.state_bytes * slots for page in units)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)


def parse_bytes(text: str) -> int:
    """A number of bytes: "4096", "512MiB", "1.5GiB", "2GB".

    Raises:
        RequestInvalid: it is no such thing.
    """
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        count = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise RequestInvalid(
            f"{text!r} is no number of bytes; write 4096, 512MiB or 1.5GiB", field="bytes", value=text
        ) from None
    if count < 1:
        raise RequestInvalid(f"{text!r} is below one byte", field="bytes", value=text)
    return count


def layer_summary(plans: ModelPlans) -> str:
    """For people: "qwen3_next, 8 layers: 6 linear, 2 full"."""
    counts = [f"{plans.target.count(kind)} {kind.value}" for kind in Kind if plans.target.count(kind)]
    return f"{plans.family}, {len(plans.target)} layers: {', '.join(counts)}"
