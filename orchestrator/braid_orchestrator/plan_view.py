"""A layer plan for people (a strip, a table, totals) and for programs (JSON).

JSON, whose keys are stable:

    family, model_type, architecture, dtype, vocab_size, hidden_size, max_positions
    target, draft   null, or
        layers      [{layer_id, kind, mechanism, service, geometry: {full, linear},
                      state_bytes, kv_bytes_per_token}]
        counts      {full, linear, parallel, none}
        digest      SHA-256 over the layers, as the services compute it
    totals          {context, kv_bytes, state_bytes, total_bytes} of the roles shown, per sequence
    notes           [text]

`kind` is full, linear, parallel or none; `service` is full, linear, "linear+full", or null for a
layer that no service runs. Bytes are of one sequence, one state version, float32 recurrent states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from braid_wire.errors import RequestInvalid
from braid_wire.layers import (
    GatedDelta,
    Geometry,
    Gqa,
    KimiDelta,
    Kind,
    LayerPlan,
    LayerSpec,
    Lightning,
    Mamba1,
    Mamba2,
    Mla,
    ShortConv,
    digest,
)
from rich.console import Console
from rich.table import Table
from rich.text import Text

from braid_orchestrator.layer_plan.plans import DTYPE_BYTES, ModelPlans, build_plans, load_config
from braid_orchestrator.layer_plan.sizes import Memory, kv_bytes_per_token, plan_memory, state_bytes

DEFAULT_CONTEXT = 4096
ROLES = ("target", "draft", "both")


@dataclass(frozen=True)
class _Look:
    glyph: str
    ascii: str
    style: str
    service: str | None


_LOOKS: Mapping[Kind, _Look] = {
    Kind.LINEAR: _Look("▪", "-", "cyan", "linear"),
    Kind.FULL: _Look("█", "#", "magenta", "full"),
    Kind.PARALLEL: _Look("◫", "=", "yellow", "linear+full"),
    Kind.NONE: _Look("·", ".", "dim", None),
}

_RULER = 10  # about one id on the ruler per so many layers
_MAX_RUNS = 9  # a pattern with more runs than this is no pattern to a reader


def plan_command(
    path: Path,
    json_out: bool = False,
    context: int = DEFAULT_CONTEXT,
    compact: bool = False,
    role: str = "both",
    console: Console | None = None,
) -> int:
    """The body of `braid plan CONFIG_OR_MODEL_DIR`.

    Args:
        path: a config.json, or a directory that holds one.
        json_out: print JSON instead of the view for people.
        context: tokens per sequence that the totals are for.
        compact: one row per run of identical layers.
        role: "target", "draft" or "both".
        console: where to print; the terminal by default.

    Returns:
        The exit status, 0.

    Raises:
        ConfigInvalid: the config cannot be read, is unknown, or contradicts itself.
        RequestInvalid: `context` is negative, or `role` is unknown or not declared by the config.
    """
    console = console or Console()
    plans = build_plans(load_config(path))
    if json_out:
        # Not through rich: it would wrap and colour what a program is going to read.
        text = json.dumps(to_json(plans, context, role), indent=2, ensure_ascii=False, allow_nan=False)
        console.file.write(text + "\n")
    else:
        render(plans, context, console, compact, role)
    return 0


def to_json(plans: ModelPlans, context: int = DEFAULT_CONTEXT, role: str = "both") -> dict[str, Any]:
    """The plan as JSON; the keys are those of this module's docstring.

    Raises:
        RequestInvalid: as `plan_command`.
    """
    itemsize = DTYPE_BYTES[plans.dtype]
    chosen = _chosen(plans, role)
    memory = _total([plan_memory(plan, context, itemsize) for plan in chosen.values()], context)
    roles = {
        name: _plan_json(chosen[name], itemsize) if name in chosen else None for name in ("target", "draft")
    }
    return {
        "family": plans.family,
        "model_type": plans.model_type,
        "architecture": plans.architecture,
        "dtype": plans.dtype,
        "vocab_size": plans.vocab_size,
        "hidden_size": plans.hidden_size,
        "max_positions": plans.max_positions,
        **roles,
        "totals": {
            "context": context,
            "kv_bytes": memory.kv_bytes,
            "state_bytes": memory.state_bytes,
            "total_bytes": memory.total_bytes,
        },
        "notes": list(plans.notes),
    }


def render(
    plans: ModelPlans,
    context: int,
    console: Console,
    compact: bool = False,
    role: str = "both",
) -> None:
    """Print the plan for people: heading, then strip, table and totals of each role, then notes.

    Raises:
        RequestInvalid: as `plan_command`.
    """
    chosen = _chosen(plans, role)
    itemsize = DTYPE_BYTES[plans.dtype]
    facts = (
        f"{plans.architecture or plans.model_type}, {plans.dtype}, hidden {plans.hidden_size:,}, "
        f"vocab {plans.vocab_size:,}, {plans.max_positions:,} positions"
    )
    heading = _hanging(f"{plans.family}  ", facts, console.width)
    heading.stylize("bold", 0, len(plans.family))
    console.print(heading)
    for name, plan in chosen.items():
        console.print()
        _render_plan(name, plan, plan_memory(plan, context, itemsize), itemsize, console, compact)
    if len(chosen) > 1:
        total = _total([plan_memory(plan, context, itemsize) for plan in chosen.values()], context)
        console.print()
        console.print(_totals_line("both roles", total))
    for note in _notes(plans, context):
        console.print(_hanging("note  ", note, console.width), style="dim")


def strip(plan: LayerPlan, width: int, ascii_only: bool = False) -> Text:
    """One glyph per layer in rows that fit `width`, each under a ruler of layer ids."""
    margin = 2
    step = _ruler_step([spec.kind for spec in plan])
    per_row = max(step, (width - 2 * margin) // step * step)
    lines = Text()
    for start in range(0, len(plan), per_row):
        row = plan.layers[start : start + per_row]
        ids = "".join(str(start + i).ljust(step) for i in range(0, len(row), step)).rstrip()
        lines.append(" " * margin + ids + "\n", style="dim")
        lines.append(" " * margin)
        for spec in row:
            look = _LOOKS[spec.kind]
            lines.append(look.ascii if ascii_only else look.glyph, style=look.style)
        lines.append("\n")
    lines.rstrip()
    return lines


def pattern(kinds: Sequence[Kind]) -> str:
    """What repeats, in words: "3×linear + 1×full, ×12", or "irregular"."""
    period, times = _repeat(kinds)
    if times == 1 or times * period * 2 < len(kinds):
        runs = _runs(kinds)
        return _spell(runs) if len(runs) <= _MAX_RUNS else "irregular"
    text = f"{_spell(_runs(kinds[:period]))}, ×{times}" if period > 1 else _spell(_runs(kinds[:times]))
    rest = _runs(kinds[period * times :])
    if not rest:
        return text
    tail = _spell(rest) if len(rest) < _MAX_RUNS // 2 else f"{len(kinds) - period * times} others"
    return f"{text}, then {tail}"


def human_bytes(count: int) -> str:
    """Bytes in binary units with three significant digits: "512 B", "1.25 MiB", "20 GiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" else max(0, 3 - len(str(int(size))))
    text = f"{size:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"


def _chosen(plans: ModelPlans, role: str) -> dict[str, LayerPlan]:
    if role not in ROLES:
        raise RequestInvalid(
            f"role is {role!r}; it must be one of {', '.join(ROLES)}", field="role", value=role
        )
    if role == "draft" and plans.draft is None:
        raise RequestInvalid("role is 'draft', but the config declares no draft", field="role", value=role)
    declared = {"target": plans.target, "draft": plans.draft}
    return {name: plan for name, plan in declared.items() if plan is not None and role in (name, "both")}


def _plan_json(plan: LayerPlan, itemsize: int) -> dict[str, Any]:
    return {
        "layers": [_layer_json(spec, itemsize) for spec in plan],
        "counts": {kind.value: plan.count(kind) for kind in Kind},
        "digest": digest(plan),
    }


def _layer_json(spec: LayerSpec, itemsize: int) -> dict[str, Any]:
    canonical = spec.to_json()
    return {
        "layer_id": spec.layer_id,
        "kind": spec.kind.value,
        "mechanism": spec.mechanism,
        "service": _LOOKS[spec.kind].service,
        "geometry": {"full": canonical["full"], "linear": canonical["linear"]},
        "state_bytes": state_bytes(spec, itemsize),
        "kv_bytes_per_token": kv_bytes_per_token(spec, itemsize),
    }


def _total(parts: Iterable[Memory], context: int) -> Memory:
    kept = list(parts)
    return Memory(context, sum(part.kv_bytes for part in kept), sum(part.state_bytes for part in kept))


def _render_plan(
    name: str, plan: LayerPlan, memory: Memory, itemsize: int, console: Console, compact: bool
) -> None:
    ascii_only = console.options.ascii_only
    kinds = [spec.kind for spec in plan]
    title = Text.assemble((name, "bold"), f"  {len(plan)} layer{'s' if len(plan) > 1 else ''}  ")
    title.append(f"digest {digest(plan)[:12]}", style="dim")
    console.print(title)
    console.print(strip(plan, console.width, ascii_only))
    console.print(_legend(plan, ascii_only))
    console.print(_hanging("  ", pattern(kinds), console.width))
    console.print(_table(plan, itemsize, compact))
    console.print(_totals_line(name, memory))


def _legend(plan: LayerPlan, ascii_only: bool) -> Text:
    legend = Text("  ")
    for kind, look in _LOOKS.items():
        if plan.count(kind):
            legend.append(look.ascii if ascii_only else look.glyph, style=look.style)
            legend.append(f" {kind.value} {plan.count(kind)}   ")
    legend.rstrip()
    return legend


def _table(plan: LayerPlan, itemsize: int, compact: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("mechanism")
    table.add_column("service", no_wrap=True)
    table.add_column("geometry")
    table.add_column("state", justify="right", no_wrap=True)
    table.add_column("KV/token", justify="right", no_wrap=True)
    for specs in _rows(plan, compact):
        first, last = specs[0], specs[-1]
        look = _LOOKS[first.kind]
        state, kv = state_bytes(first, itemsize), kv_bytes_per_token(first, itemsize)
        table.add_row(
            str(first.layer_id) if len(specs) == 1 else f"{first.layer_id}-{last.layer_id}",
            Text(first.kind.value, style=look.style),
            Text(first.mechanism),
            look.service or "-",
            Text("\n".join(short_geometry(side) for side in (first.linear, first.full) if side is not None)),
            human_bytes(state) if state else "-",
            human_bytes(kv) if kv else "-",
        )
    return table


def _rows(plan: LayerPlan, compact: bool) -> Iterator[list[LayerSpec]]:
    if not compact:
        yield from ([spec] for spec in plan)
        return
    for _, run in groupby(plan, key=lambda spec: (spec.kind, spec.full, spec.linear)):
        yield list(run)


def _totals_line(name: str, memory: Memory) -> Text:
    return Text.assemble(
        (human_bytes(memory.total_bytes), "bold"),
        f" per sequence ({name}) at {memory.context:,} tokens: "
        f"{human_bytes(memory.kv_bytes)} KV + {human_bytes(memory.state_bytes)} state",
    )


def _notes(plans: ModelPlans, context: int) -> Iterator[str]:
    yield from plans.notes
    if any(isinstance(spec.full, Gqa) and spec.full.sliding_window for spec in plans.target):
        yield "pages are append-only: layers with a window are counted with their full KV"
    if context > plans.max_positions:
        yield f"the context exceeds the model's {plans.max_positions:,} positions"


def _hanging(label: str, body: str, width: int) -> Text:
    """`body` after `label`, its further lines indented under the first."""
    room = max(20, width - len(label))
    lines = [""]
    for word in body.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if len(joined) <= room:
            lines[-1] = joined
        else:
            lines.append(word)
    return Text(label + ("\n" + " " * len(label)).join(lines))


def _runs(kinds: Sequence[Kind]) -> list[tuple[Kind, int]]:
    return [(kind, len(list(run))) for kind, run in groupby(kinds)]


def _ruler_step(kinds: Sequence[Kind]) -> int:
    """A multiple of the period near ten, so that what repeats stands in columns."""
    period, times = _repeat(kinds)
    if times == 1 or times * period * 2 < len(kinds) or period > 2 * _RULER:
        return _RULER
    return period * max(1, round(_RULER / period))


def _spell(runs: Sequence[tuple[Kind, int]]) -> str:
    return " + ".join(f"{count}×{kind.value}" for kind, count in runs)


def _repeat(kinds: Sequence[Kind]) -> tuple[int, int]:
    """(period, times) of the repeated prefix that covers most; the shortest such period.

    A run of equal layers is no repetition unless it is all there is.
    """
    best = (1, 1)
    for period in range(1, len(kinds) // 2 + 1):
        times = 1
        while kinds[times * period : (times + 1) * period] == kinds[:period]:
            times += 1
        if len(set(kinds[:period])) == 1 and times < len(kinds):
            continue
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _short_gqa(g: Gqa) -> str:
    value = "" if g.v_head_dim == g.head_dim else f"/{g.v_head_dim}"
    window = f" w{g.sliding_window}" if g.sliding_window else ""
    return f"{g.num_q_heads}q/{g.num_kv_heads}kv ×{g.head_dim}{value}{window}"


def _short_kimi(g: KimiDelta) -> str:
    bound = f" ≥{g.gate_lower_bound:g}" if g.gate_lower_bound else ""
    return f"{g.num_heads}h ×{g.head_dim} c{g.conv_width}{bound}"


def _short_delta(g: GatedDelta) -> str:
    beta = f" β×{g.beta_scale:g}" if g.beta_scale != 1 else ""
    return f"{g.num_k_heads}k/{g.num_v_heads}v ×{g.k_head_dim}/{g.v_head_dim} c{g.conv_width}{beta}"


_SHORT: Mapping[type[Geometry], Callable[[Any], str]] = {
    Gqa: _short_gqa,
    Mla: lambda g: (
        f"{g.num_heads}h ×{g.qk_nope_head_dim}+{g.qk_rope_head_dim}/{g.v_head_dim} r{g.kv_lora_rank}"
    ),
    GatedDelta: _short_delta,
    KimiDelta: _short_kimi,
    Lightning: lambda g: f"{g.num_heads}h ×{g.head_dim}" + (" silu" if g.activation == "silu" else ""),
    Mamba2: lambda g: f"{g.num_heads}h ×{g.head_dim} n{g.state_dim} g{g.num_groups} c{g.conv_width}",
    Mamba1: lambda g: f"{g.inner_dim} n{g.state_dim} dt{g.dt_rank} c{g.conv_width}",
    ShortConv: lambda g: f"{g.channels} c{g.conv_width}",
}


def short_geometry(geometry: Geometry) -> str:
    """A geometry in a few characters: "4q/2kv ×64"."""
    return _SHORT[type(geometry)](geometry)
