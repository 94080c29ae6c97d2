"""Measures a cell against its peers, in one run, on the same weights, dtype and threads.

A figure counts only beside another from the same run, and only if the outputs agree: a benchmark
refuses to report a peer whose logits are not the reference's.

| module | measures |
|---|---|
| `runs` | tokens per second of decode and prefill |
| `hop` | the time in a layer that is not its kernel, transport against transport |
| `scale` | steps and memory against layers, sequences and context |
| `overlap` | two lanes against one |
| `serve`, `serve_run`, `workload` | requests of many clients at once, open and closed loop |
| `trace` | when each layer of some steps ran |
"""
