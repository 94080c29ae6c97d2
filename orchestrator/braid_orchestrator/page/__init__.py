"""The live page of a cell: what runs where and what it costs, in a browser on the same machine.

`snapshots` reads what the cell counts anyway, `broadcast` gives a frame of it each second to whoever
listens, `server` serves both and the files of `static/`. Nobody listening costs nothing.
"""

from braid_orchestrator.page.server import Page, Place

__all__ = ["Page", "Place"]
