"""Clients of a running cell: one that blocks, and one for asyncio.

    with Client("unix:/run/user/1000/braid/1a2b3c4d/orchestrator.sock") as client:
        for chunk in client.generate("def add(", max_tokens=32):
            print(chunk.text, end="", flush=True)

    async with AsyncClient("127.0.0.1:50051") as client:
        async for chunk in client.generate("def add(", max_tokens=32):
            print(chunk.text, end="", flush=True)

Every method raises the typed errors of `braid_wire.errors`; a cell that cannot be reached is
`ServiceLost`.
"""

from braid_orchestrator.client.asynchronous import AsyncClient, AsyncGeneration
from braid_orchestrator.client.blocking import Client, Generation
from braid_orchestrator.client.messages import (
    Chunk,
    Completion,
    GenerateOptions,
    Prompt,
    Scores,
    TokenLogprob,
)
from braid_orchestrator.sampling import Sampling

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Chunk",
    "Client",
    "Completion",
    "GenerateOptions",
    "Generation",
    "Prompt",
    "Sampling",
    "Scores",
    "TokenLogprob",
]
