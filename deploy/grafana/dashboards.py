"""Grafana's dashboards of Braid, as code: `python deploy/grafana/dashboards.py` writes dashboards/*.json.

`--check` fails instead where a committed file is not what this gives. Three dashboards, one question
each: *Overview*, do requests go well; *Routing*, where did every layer go and what did it cost; *State*,
what do pages, slots and their versions hold.

Every process counts layers: the orchestrator's hop and compute are as the body sees them, queue is
known to the services alone. So each query names the processes that it is about: `$orchestrator` and
`$services` are all of `$instance` of that sort.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

FOLDER = Path(__file__).parent / "dashboards"
DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="braid-prometheus")
TAG = "braid"
COLUMNS = 24

# What a refusal at the boundary between the orchestrator and its services is called.
ROUTING_REASONS = (
    "LAYER_MISROUTED|LAYER_UNKNOWN|LAYER_PLAN_DISPUTED|PLAN_MISSING|PLAN_MISMATCH|EPOCH_STALE|STEP_ORDER|"
    "VIEW_INVALID|REFERENCE_STALE|BATCH_INVALID|NOT_CONFIGURED|CAPTURE_VIOLATION"
)

BODY = 'instance=~"$orchestrator"'
SERVICES = 'instance=~"$services"'
ALL = 'instance=~"$instance"'
ROLE = 'role=~"$role"'
WINDOW = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of its series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel: `look` is lines, stack, stat, table or heat."""

    title: str
    about: str
    unit: str
    queries: Sequence[Query]
    look: str = "lines"
    width: int = 12
    height: int = 8
    most: float | None = None
    """Largest value of the axis."""


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


def quantiles(metric: str, labels: str, by: str = "", legend: str = "", shares: str = "") -> list[Query]:
    """Percentiles of a histogram: median, 95th and 99th, or those in `shares`."""
    group = f"le, {by}" if by else "le"
    return [
        Query(
            f"histogram_quantile(0.{share}, sum by ({group}) (rate({metric}_bucket{{{labels}}}{WINDOW})))",
            f"{legend} p{share}".strip(),
        )
        for share in (shares or "50 95 99").split()
    ]


def rate(metric: str, labels: str, by: str = "") -> str:
    """Per second, summed."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}{WINDOW}))"


def mean(metric: str, labels: str, by: str) -> str:
    """Mean of a histogram's observations."""
    return f"{rate(f'{metric}_sum', labels, by)} / {rate(f'{metric}_count', labels, by)}"


def share(part: str, *others: str) -> str:
    """A part of the sum of it and others."""
    return f"{part} / ({' + '.join((part, *others))})"


def overview() -> Iterator[Row]:
    """Do requests go well?"""
    yield Row(
        "At a glance",
        [
            Panel(
                "Tokens made",
                "Tokens made per second, by all cells shown.",
                "suffix: tok/s",
                [Query(rate("braid_generated_tokens_total", BODY))],
                "stat",
                4,
                4,
            ),
            Panel(
                "Requests ended",
                "Per second, however they ended.",
                "reqps",
                [Query(rate("braid_requests_finished_total", BODY))],
                "stat",
                4,
                4,
            ),
            Panel(
                "First token, p95",
                "From arrival to the first token.",
                "s",
                quantiles("braid_request_first_token_seconds", BODY, shares="95"),
                "stat",
                4,
                4,
            ),
            Panel(
                "Between tokens, p95",
                "From one token of a request to its next.",
                "s",
                quantiles("braid_request_inter_token_seconds", BODY, shares="95"),
                "stat",
                4,
                4,
            ),
            Panel(
                "In hand",
                "Requests that run and that wait.",
                "none",
                [
                    Query(f"sum(braid_requests_running{{{BODY}}})", "running"),
                    Query(f"sum(braid_requests_waiting{{{BODY}}})", "waiting"),
                ],
                "stat",
                4,
                4,
            ),
            Panel(
                "Processes up",
                "Processes that Prometheus reaches, of those shown.",
                "none",
                [Query(f"sum(up{{{ALL}}})", "up"), Query(f"count(up{{{ALL}}})", "of")],
                "stat",
                4,
                4,
            ),
        ],
    )
    yield Row(
        "Requests",
        [
            Panel(
                "Tokens",
                "Prompt tokens fed and tokens made, per second.",
                "suffix: tok/s",
                [
                    Query(rate("braid_generated_tokens_total", BODY), "made"),
                    Query(rate("braid_prompt_tokens_total", BODY), "prompt"),
                ],
            ),
            Panel(
                "Requests by outcome",
                "How requests ended: a finish reason, or the reason of an error.",
                "reqps",
                [Query(rate("braid_requests_finished_total", BODY, "outcome"), "{{outcome}}")],
                "stack",
            ),
            Panel(
                "Time to first token",
                "From arrival to the first token.",
                "s",
                quantiles("braid_request_first_token_seconds", BODY),
            ),
            Panel(
                "Time between tokens",
                "From one token of a request to its next.",
                "s",
                quantiles("braid_request_inter_token_seconds", BODY),
            ),
            Panel(
                "Time in queue and to the end",
                "From arrival to the first step, and to the end of a request.",
                "s",
                [
                    *quantiles("braid_request_queue_seconds", BODY, legend="queue", shares="50 95"),
                    *quantiles("braid_request_seconds", BODY, legend="end", shares="50 95"),
                ],
            ),
            Panel(
                "Slowdown by neighbours",
                "Time to the end over the time of the steps that a request took part in; 1: as if alone.",
                "none",
                quantiles("braid_request_slowdown_ratio", BODY, shares="50 95"),
            ),
            Panel(
                "Requests in hand",
                "Running and waiting, with the most of each.",
                "none",
                [
                    Query(f"sum(braid_requests_running{{{BODY}}})", "running"),
                    Query(f"sum(braid_requests_waiting{{{BODY}}})", "waiting"),
                    Query(f"sum(braid_requests_running_limit{{{BODY}}})", "may run in a step"),
                ],
            ),
            Panel(
                "Errors by reason",
                "Refused and failed calls, by the reason of the error table.",
                "reqps",
                [
                    Query(
                        rate("braid_refused_total", ALL, "instance, reason") + " > 0",
                        "{{reason}} at {{instance}}",
                    )
                ],
                "stack",
            ),
        ],
    )
    yield Row(
        "Cells",
        [
            Panel(
                "Pools",
                "Share of pages and slots that sequences hold; what only the prefix cache keeps is free.",
                "percentunit",
                [
                    Query(f"braid_pages_used{{{BODY}}} / braid_pages_total", "{{role}} pages, {{instance}}"),
                    Query(f"braid_slots_used{{{BODY}}} / braid_slots_total", "{{role}} slots, {{instance}}"),
                ],
                most=1,
            ),
            Panel(
                "Steps",
                "Steps per second by what they held.",
                "ops",
                [Query(rate("braid_step_seconds_count", BODY, "mode"), "{{mode}}")],
                "stack",
            ),
            Panel(
                "Time of a step",
                "By what the step held.",
                "s",
                quantiles("braid_step_seconds", BODY, "mode", "{{mode}}", "50 95"),
            ),
            Panel(
                "Tokens of a step",
                "Mean number of tokens that one step feeds.",
                "none",
                [Query(mean("braid_step_tokens", BODY, "instance"), "{{instance}}")],
            ),
            Panel(
                "Epoch and replays",
                "An epoch ends when a step is aborted or a service is lost; replays are steps run again.",
                "none",
                [
                    Query(f"max by (instance) (braid_epoch{{{ALL}}})", "epoch {{instance}}"),
                    Query(f"sum(braid_replays_total{{{BODY}}})", "replays"),
                ],
            ),
            Panel(
                "Processor",
                "Cores that each process uses.",
                "none",
                [Query(f"rate(process_cpu_seconds_total{{{ALL}}}{WINDOW})", "{{instance}}")],
            ),
            Panel(
                "Memory",
                "Resident bytes of each process; shared memory counts in every process that touched it.",
                "bytes",
                [Query(f"process_resident_memory_bytes{{{ALL}}}", "{{instance}}")],
            ),
            Panel(
                "Versions",
                "What runs.",
                "none",
                [Query(f"braid_build_info{{{ALL}}} * on (instance) group_left (model) braid_model_info")],
                "table",
            ),
        ],
    )


def routing() -> Iterator[Row]:
    """Where did every layer go, and what did it cost?"""
    point = f'{BODY}, {ROLE}, phase=~"compute|hop"'
    one = f'{BODY}, {ROLE}, phase="compute"'
    per_layer = (
        f"{rate('braid_layer_seconds_sum', point, 'role, layer_id, kind')}"
        f" / {rate('braid_layer_seconds_count', one, 'role, layer_id, kind')}"
    )
    yield Row(
        "Layers",
        [
            Panel(
                "Latency of every layer",
                "Mean time that the body waits for a layer, kernel and hop, by layer and service.",
                "s",
                [Query(_in_layer_order(per_layer), "{{row}}")],
                "heat",
                24,
                14,
            ),
            Panel(
                "Dispatches in the time shown",
                "How often each layer went where.",
                "short",
                [
                    Query(
                        "sum by (role, layer_id, kind, mechanism, mode) "
                        f"(increase(braid_layer_dispatch_total{{{BODY}, {ROLE}}}[$__range]))"
                    )
                ],
                "table",
                24,
                10,
            ),
        ],
    )
    dispatched = f"{BODY}, {ROLE}"
    yield Row(
        "Dispatches",
        [
            Panel(
                f"By {label}",
                f"Layers dispatched per second, by {label}.",
                "ops",
                [Query(rate("braid_layer_dispatch_total", dispatched, label), f"{{{{{label}}}}}")],
                "stack",
                6,
            )
            for label in ("kind", "mechanism", "role", "mode")
        ],
    )
    yield Row(
        "Cost",
        [
            Panel(
                "Hop, compute and queue",
                "Mean of a layer: in the kernel; beyond it, as the body sees it; of that, in the service.",
                "s",
                [
                    Query(_phase("compute", SERVICES), "{{kind}} compute"),
                    Query(_phase("hop", BODY), "{{kind}} hop"),
                    Query(_phase("queue", SERVICES), "{{kind}} queue"),
                ],
            ),
            Panel(
                "Hop, compute and queue, p95",
                "Of single layers, by kind.",
                "s",
                [
                    query
                    for phase, where in (("compute", SERVICES), ("hop", BODY), ("queue", SERVICES))
                    for query in quantiles(
                        "braid_layer_seconds",
                        f'{where}, {ROLE}, phase="{phase}"',
                        "kind",
                        f"{{{{kind}}}} {phase}",
                        "95",
                    )
                ],
            ),
            Panel(
                "Share of steps in attention",
                "Of the time of all steps: in kernels of the services, and in hops. The rest is the body. "
                "With two lanes the parts run at the same time.",
                "percentunit",
                [
                    Query(
                        rate("braid_layer_seconds_sum", f'{BODY}, phase="{phase}"')
                        + " / "
                        + rate("braid_step_seconds_sum", BODY),
                        phase,
                    )
                    for phase in ("compute", "hop")
                ],
            ),
            Panel(
                "Time to plan",
                "Services: checking and planning a batch. Orchestrator: waiting for their plans.",
                "s",
                quantiles("braid_plan_seconds", ALL, "instance", "{{instance}}", "50 95"),
            ),
        ],
    )
    yield Row(
        "What may not happen",
        [
            Panel(
                "Misroutes and refusals",
                "Layers and steps refused at the boundary; anything but none is a fault of somebody.",
                "ops",
                [
                    Query(
                        rate(
                            "braid_refused_total",
                            f'{ALL}, reason=~"{ROUTING_REASONS}"',
                            "instance, reason",
                        )
                        + " > 0",
                        "{{reason}} at {{instance}}",
                    )
                ],
            ),
            Panel(
                "Misrouted layers",
                "Layers that reached the wrong service or that no plan has, in the time shown.",
                "short",
                [
                    Query(
                        "sum by (reason) (increase(braid_refused_total"
                        f'{{{ALL}, reason=~"LAYER_MISROUTED|LAYER_UNKNOWN|PLAN_MISSING"}}[$__range]))',
                        "{{reason}}",
                    )
                ],
                "stat",
            ),
        ],
    )


def state() -> Iterator[Row]:
    """What do pages, slots and their versions hold?"""
    held = f"{BODY}, {ROLE}"
    yield Row(
        "Memory",
        [
            Panel(
                f"{name.title()}",
                f"{what} that sequences hold, and all there are.",
                "short",
                [
                    Query(f"sum by (role) (braid_{name}_used{{{held}}})", "{{role}} held"),
                    Query(f"sum by (role) (braid_{name}_total{{{held}}})", "{{role}} in all"),
                ],
            )
            for name, what in (("pages", "Pages of keys and values"), ("slots", "Recurrent states"))
        ]
        + [
            Panel(
                "Kept for later",
                "Bytes that only the prefix cache keeps; they are free when somebody needs them.",
                "bytes",
                [
                    Query(f"sum by (role) (braid_prefix_cache_pages_bytes{{{held}}})", "{{role}} pages"),
                    Query(f"sum by (role) (braid_prefix_cache_slots_bytes{{{held}}})", "{{role}} states"),
                ],
                "stack",
            ),
            Panel(
                "Requests that gave way",
                "Preempted to make room for older ones; what they made is computed again.",
                "ops",
                [Query(rate("braid_preemptions_total", BODY, "instance"), "{{instance}}")],
            ),
        ],
    )
    yield Row(
        "Versions",
        [
            Panel(
                "Versions of states",
                "Committed: became a sequence's state. Dropped: of guesses that were rejected. "
                "Aborted: of steps that failed or were replayed.",
                "ops",
                [
                    Query(
                        rate("braid_state_versions_total", held, "role, outcome"),
                        "{{role}} {{outcome}}",
                    )
                ],
                "stack",
            ),
            Panel(
                "Epochs",
                "The orchestrator's and the services' must agree, but while a service is configured.",
                "none",
                [Query(f"max by (instance) (braid_epoch{{{ALL}}})", "{{instance}}")],
            ),
        ],
    )
    hits, misses = rate("braid_prefix_hits_total", BODY), rate("braid_prefix_misses_total", BODY)
    tokens, prompt = rate("braid_prefix_hit_tokens_total", BODY), rate("braid_prompt_tokens_total", BODY)
    accepted, rejected = (
        rate("braid_draft_tokens_total", f'{BODY}, outcome="{outcome}"')
        for outcome in ("accepted", "rejected")
    )
    yield Row(
        "Prefix cache and drafts",
        [
            Panel(
                "Prefix hits",
                "Share of requests that began behind a cached prefix, and of prompt tokens not computed.",
                "percentunit",
                [Query(share(hits, misses), "requests"), Query(share(tokens, prompt), "prompt tokens")],
                most=1,
            ),
            Panel(
                "Evicted prefixes",
                "Pages and states dropped to make room.",
                "ops",
                [
                    Query(rate("braid_prefix_evicted_pages_total", BODY), "pages"),
                    Query(rate("braid_prefix_evicted_states_total", BODY), "states"),
                ],
            ),
            Panel(
                "Drafted tokens",
                "Guesses that the model confirmed or not, per second.",
                "suffix: tok/s",
                [Query(rate("braid_draft_tokens_total", BODY, "outcome"), "{{outcome}}")],
                "stack",
            ),
            Panel(
                "Drafts accepted",
                "Share of guesses that the model confirmed.",
                "percentunit",
                [Query(share(accepted, rejected), "accepted")],
                most=1,
            ),
        ],
    )


def _phase(phase: str, where: str) -> str:
    return mean("braid_layer_seconds", f'{where}, {ROLE}, phase="{phase}"', "kind")


def _in_layer_order(expr: str) -> str:
    """Series with one label, `row`: "target 007 full". Grafana draws rows in the order of their labels."""
    for digits, zeros in (("[0-9]", "00"), ("[0-9]{2}", "0"), ("[0-9]{3,}", "")):
        expr = f'label_replace({expr}, "row", "{zeros}$1", "layer_id", "({digits})")'
    return f'sum by (row) (label_join({expr}, "row", " ", "role", "row", "kind"))'


DASHBOARDS = {
    "overview": ("Braid: Overview", overview, "Do requests go well?"),
    "routing": ("Braid: Routing", routing, "Where did every layer go, and what did it cost?"),
    "state": ("Braid: State", state, "What do pages, slots and their versions hold?"),
}


def build(name: str) -> models.Dashboard:
    """One dashboard."""
    title, rows, about = DASHBOARDS[name]
    builder = (
        dashboard.Dashboard(title)
        .uid(f"braid-{name}")
        .description(about)
        .tags([TAG])
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboard.DashboardLink("Braid")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .include_vars(True)
            .keep_time(True)
        )
    )
    for each in variables():
        builder.with_variable(each)
    top = 0
    for row in rows():
        builder.with_row(dashboard.Row(row.title).grid_pos(models.GridPos(h=1, w=COLUMNS, x=0, y=top)))
        top += 1
        left = height = 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                left, top, height = 0, top + height, 0
            place = models.GridPos(h=panel.height, w=panel.width, x=left, y=top)
            builder.with_panel(drawn(panel).grid_pos(place))
            left, height = left + panel.width, max(height, panel.height)
        top += height
    made = builder.build()
    for number, panel in enumerate(made.panels or (), start=1):
        panel.id_val = number
    return made


def variables() -> Iterator[dashboard.QueryVariable]:
    """Model, instance and role to choose from, and which of the instances are of which sort."""
    yield variable("model", "Model", "label_values(braid_model_info, model)")
    yield variable("instance", "Instance", 'label_values(braid_model_info{model=~"$model"}, instance)')
    yield variable("role", "Role", 'label_values(braid_layer_dispatch_total{instance=~"$instance"}, role)')
    for name, services in (("orchestrator", "orchestrator"), ("services", "full|linear")):
        query = f'label_values(braid_build_info{{instance=~"$instance", service=~"{services}"}}, instance)'
        yield variable(name, name, query).hide(models.VariableHide.HIDE_VARIABLE)


def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """Several values, all of them by default."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query({"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def drawn(panel: Panel) -> timeseries.Panel | stat.Panel | table.Panel | heatmap.Panel:
    """A panel in its look."""
    made = {"stat": _stat, "table": _table, "heat": _heat}.get(panel.look, _lines)(panel)
    made.title(panel.title).description(panel.about).datasource(DATASOURCE).unit(panel.unit).min(0)
    if panel.most is not None:
        made.max(panel.most)
    for place, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).ref_id(chr(ord("A") + place)).datasource(DATASOURCE)
        if query.legend:
            target.legend_format(query.legend)
        if panel.look == "table":
            target.instant().format(prometheus_models.PromQueryFormat.TABLE)
        else:
            target.range()
        made.with_target(target)
    return made


def _lines(panel: Panel) -> timeseries.Panel:
    legend = (
        common.VizLegendOptions()
        .display_mode(common_models.LegendDisplayMode.LIST)
        .placement(common_models.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    tooltip = common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI)
    made = timeseries.Panel().legend(legend).tooltip(tooltip).line_width(1)
    if panel.look == "stack":
        made.fill_opacity(30).stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    else:
        made.fill_opacity(8)
    return made


def _stat(panel: Panel) -> stat.Panel:
    reduce = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().reduce_options(reduce).graph_mode(common_models.BigValueGraphMode.AREA)


def _table(panel: Panel) -> table.Panel:
    hidden = models.DataTransformerConfig(
        id_val="organize",
        options={"excludeByName": {"Time": True, "__name__": True, "job": True}, "renameByName": {}},
    )
    return table.Panel().with_transformation(hidden).filterable(True)


def _heat(panel: Panel) -> heatmap.Panel:
    color = (
        heatmap.HeatmapColorOptions()
        .mode(heatmap_models.HeatmapColorMode.SCHEME)
        .scheme("Viridis")
        .scale(heatmap_models.HeatmapColorScale.EXPONENTIAL)
        .exponent(0.5)
        .steps(64)
    )
    rows = heatmap.RowsHeatmapOptions().layout(common_models.HeatmapCellLayout.UNKNOWN).value("latency")
    return (
        heatmap.Panel()
        .calculate(False)
        .color(color)
        .rows_frame(rows)
        .cell_gap(1)
        .cell_values(heatmap.CellValues().unit(panel.unit))
        .y_axis(heatmap.YAxisConfig().reverse(True))
        .show_legend()
        .mode(common_models.TooltipDisplayMode.SINGLE)
    )


def text(name: str) -> str:
    """A dashboard's file."""
    return json.dumps(build(name), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> int:
    """Write the files, or hold them against what they should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="Write nothing; fail where a file is not up to date."
    )
    check = parser.parse_args().check
    stale = []
    for name in DASHBOARDS:
        path, wanted = FOLDER / f"{name}.json", text(name)
        if not path.exists() or path.read_text() != wanted:
            stale.append(path.name)
            if not check:
                path.write_text(wanted)
    extra = sorted({path.name for path in FOLDER.glob("*.json")} - {f"{name}.json" for name in DASHBOARDS})
    if check and (stale or extra):
        print(
            f"not up to date: {', '.join(stale + extra)}; run `make dashboards` and commit", file=sys.stderr
        )
        return 1
    print(f"{len(DASHBOARDS)} dashboards, {len(stale)} of them {'stale' if check else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
