"""The orchestrator: layer plans, bodies, the walk, memory, the engine and its frontends."""
