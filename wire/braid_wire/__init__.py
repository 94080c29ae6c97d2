"""What crosses a process boundary: layer plans, arenas, views, batches, errors, channels, metrics."""
