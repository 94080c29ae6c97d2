"""What a cell could tell its page: shapes that no small cell on this machine has."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]

SHAPES = {"full": ("gqa", "32q/8kv ×128"), "linear": ("gated_delta", "16k/32v ×128/128 c4")}
SIDES = {"full": ("full",), "linear": ("linear",), "parallel": ("full", "linear"), "none": ()}


def kinds_of(count: int) -> list[str]:
    """Three linear to one full, with a layer of both sides and one of none."""
    kinds = ["full" if place % 4 == 3 else "linear" for place in range(count)]
    kinds[4], kinds[5] = "parallel", "none"
    return kinds


def description(count: int = 96) -> Json:
    """The cell event."""
    layers = [
        {
            "id": place,
            "kind": kind,
            "sides": [
                {"side": side, "mechanism": SHAPES[side][0], "shape": SHAPES[side][1]} for side in SIDES[kind]
            ],
        }
        for place, kind in enumerate(kinds_of(count))
    ]
    return {
        "model": "<b>Made-Up</b>-80B",
        "family": "qwen3_next",
        "version": "0.1.0",
        "dtype": "bfloat16",
        "state_dtype": "float32",
        "dispatch": "walk",
        "pid": 4711,
        "limits": {"max_waiting": 1024, "max_sequences": 64},
        "roles": [{"role": "target", "layers": layers}],
    }


def frame(count: int = 96, **changed: Any) -> Json:
    """A frame event: layer i takes (20 + i) µs in the kernel and 10 µs beyond it."""
    layers = [
        {
            "role": "target",
            "id": place,
            "side": side,
            "modes": {"extend": 5, "decode": 1000},
            "count": 100,
            "compute": 20.0 + place,
            "hop": 10.0,
            "queue": 3.0,
        }
        for place, kind in enumerate(kinds_of(count))
        for side in SIDES[kind]
    ]
    values = {"steps": 1005.0, "generated_tokens": 64000.0, "prompt_tokens": 9000.0, "finished": 12.0}
    made: Json = {
        "time": 1_790_000_000.0,
        "uptime": 93_784.0,
        "state": "serving",
        "epoch": 3,
        "replays": 1,
        "steps": 1005,
        "preemptions": 2,
        "totals": values,
        "rates": {name: value / 100 for name, value in values.items()},
        "elapsed": 1.0,
        "latency": {"first_token": [0.21, 1.3], "inter_token": [0.018, 0.031], "queue": [None, None]},
        "layers": layers,
        "pools": [
            {
                "role": "target",
                "name": "pages",
                "used": 950,
                "cached": 20,
                "total": 1000,
                "unit_bytes": 1 << 20,
            }
        ],
        "prefix": {"hits": 3, "misses": 1, "hit_tokens": 512, "evicted_pages": 7, "evicted_states": 1},
        "drafts": {"accepted": 30, "rejected": 10},
        "running": 2,
        "waiting": 40,
        "requests": [
            {
                "request_id": "<img src=x onerror=alert(1)>",
                "phase": "prefill",
                "prompt_tokens": 9000,
                "fed_tokens": 4096,
                "made_tokens": 0,
                "max_tokens": 64,
                "cached_tokens": 0,
                "age_s": 2.5,
            }
        ],
        "errors": [
            {
                "reason": "SERVICE_LOST",
                "message": "the linear service ended the walk",
                "first": 1_790_000_000.0,
                "last": 1_790_000_001.0,
                "count": 2,
            }
        ],
        "services": [
            {"name": "full", "address": "a", "pid": 11, "state": "ready", "why": "", "backend": "triton"},
            {
                "name": "linear",
                "address": "b",
                "pid": 12,
                "state": "lost",
                "why": "gone",
                "backend": "triton",
            },
        ],
    }
    return made | changed


def stream(*events: tuple[str, Json]) -> str:
    """The body of an event stream."""
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
