"""Pictures of what `braid bench … --out` has written: `make plots`.

    python benchmarks/plots.py [--results DIRECTORY] [--out DIRECTORY]

Each results file gives one picture, as PNG and as SVG; the same results give the same bytes. They are
opaque, so that they can be read on light and dark pages alike.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent

Results = Mapping[str, Any]
Row = Mapping[str, Any]

# Told apart by people who see few colours, and in print: Okabe and Ito.
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#7f7f7f"
PEERS = {
    "transformers": ("transformers", GREY),
    "embedded": ("Braid, one process", ORANGE),
    "": ("Braid, three processes", BLUE),
    "grpc_stream": ("gRPC stream", GREEN),
    "grpc_unary": ("gRPC calls", GREEN),
    "grpc_bytes": ("gRPC calls with bytes", RED),
}
TRANSPORTS = {
    "doorbells": "doorbells in\nshared memory",
    "grpc_stream": "gRPC stream,\nhandles",
    "grpc_unary": "gRPC call,\nhandles",
    "grpc_bytes": "gRPC call,\nbytes",
}
STYLE: Mapping[str, Any] = {
    "svg.hashsalt": "braid",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
}


def main() -> int:
    """The exit status."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = 0
    with plt.rc_context(dict(STYLE)):
        for name, draw in PICTURES.items():
            path = options.results / f"{name}.json"
            if not path.exists():
                print(f"{path} is not there; its picture is left out", file=sys.stderr)
                continue
            results = json.loads(path.read_text())
            figure = draw(results)
            sign(figure, results)
            save(figure, options.out / name)
            drawn += 1
    if not drawn:
        print(f"no results in {options.results}", file=sys.stderr)
        return 1
    return 0


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "plots")
    return parser.parse_args()


def save(figure: Figure, path: Path) -> None:
    """PNG and SVG, without a date or a version in them."""
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    plt.close(figure)
    print(f"{path}.png, {path}.svg")


def sign(figure: Figure, results: Results) -> None:
    """Say below a picture where its figures come from."""
    machine, row = results["machine"], results["rows"][0]
    # Of a cell that ran already nobody knows how many threads it has.
    about = row["dtype"] if row["threads"] is None else f"{row['dtype']}, {row['threads']} thread(s) each"
    text = (
        f"{machine['cpu']}, {machine['cores']} cores · {about} · "
        f"torch {results['versions']['torch']}, transformers {results['versions']['transformers']} · "
        f"{results['date'][:10]} · {results['command']}"
    )
    lines = textwrap.fill(text, int(figure.get_figwidth() * 24))
    figure.text(0.01, 0.008, lines, fontsize=5.5, color="#555555", ha="left", va="bottom")


def leave_room(figure: Figure) -> None:
    """Keep the lowest quarter of an inch for what `sign` writes."""
    share = 0.25 / figure.get_figheight()
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, share, 1, 1 - share))


def throughput(results: Results) -> Figure:
    """Bars of tokens per second for each batch and context, peer beside peer, each group to its own scale."""
    rows = results["rows"]
    figure, panels = plt.subplots(
        1, len(rows), figsize=(max(5.5, 1.0 + 2.4 * len(rows)), 3.4), squeeze=False, layout="constrained"
    )
    leave_room(figure)
    for axes, row in zip(panels[0], rows, strict=True):
        bars(axes, row)
    panels[0][0].set_ylabel(f"{results['bench']}, tokens/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=7.5)
    return figure


def bars(axes: Axes, row: Row) -> None:
    """One row: a bar for each peer that it has, ours last."""
    peers = [peer for peer in PEERS if peer and f"tokens_per_s_{peer}" in row]
    for place, peer in enumerate([*peers, ""]):
        label, colour = PEERS[peer]
        value = row[f"tokens_per_s_{peer}" if peer else "tokens_per_s"]
        axes.bar(place, value, color=colour, label=label, width=0.8)
        axes.annotate(
            f"{value:,.0f}", (place, value), ha="center", va="bottom", fontsize=7.5, xytext=(0, 1),
            textcoords="offset points",
        )  # fmt: skip
    axes.set_title(f"batch {row['batch']}, context {row['context']:,}", fontsize=9)
    axes.set_xticks([])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)


def hop(results: Results) -> Figure:
    """Hops of each transport on a logarithmic scale: median, and lines to the 90th and 99th percentile."""
    batches = sorted({row["batch"] for row in results["rows"]})
    loads = [load for load in ("free", "loaded") if any(row["load"] == load for row in results["rows"])]
    figure, panels = plt.subplots(
        1, len(loads), figsize=(1.2 + 3.7 * len(loads), 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    leave_room(figure)
    titles = {"free": "nothing else runs", "loaded": "a busy process on every core"}
    for axes, load in zip(panels[0], loads, strict=True):
        for number, batch in enumerate(batches):
            rows = [row for row in results["rows"] if row["load"] == load and row["batch"] == batch]
            hop_bars(axes, rows, number, len(batches))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axes.set_title(titles[load], fontsize=9)
        names = [name for name in TRANSPORTS if any(row["transport"] == name for row in results["rows"])]
        axes.set_xticks(range(len(names)), [TRANSPORTS[name] for name in names], fontsize=7.5)
        axes.grid(visible=False, axis="x")
    smallest = min(row["hop_us_p50"] for row in results["rows"])
    panels[0][0].set_ylim(bottom=10 ** math.floor(math.log10(smallest / 1.5)))
    panels[0][0].set_ylabel("hop of a layer, µs\nmedian; lines to p90 and p99")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=7.5)
    return figure


def hop_bars(axes: Axes, rows: Sequence[Row], number: int, of: int) -> None:
    """One batch: a bar for each transport."""
    names = [name for name in TRANSPORTS if any(row["transport"] == name for row in rows)]
    width = 0.8 / of
    colour = (BLUE, ORANGE, GREEN, RED)[number % 4]
    for place, name in enumerate(names):
        row = next(row for row in rows if row["transport"] == name)
        at = place + (number - (of - 1) / 2) * width
        label = f"batch {row['batch']}" if place == 0 else None
        axes.bar(at, row["hop_us_p50"], width=width * 0.92, color=colour, label=label)
        axes.vlines(at, row["hop_us_p50"], row["hop_us_p99"], color="#222222", linewidth=0.8)
        axes.plot([at, at], [row["hop_us_p90"], row["hop_us_p99"]], "_", color="#222222", markersize=6)
        axes.annotate(
            f"{row['hop_us_p50']:,.0f}", (at, row["hop_us_p50"]), ha="center", va="top", fontsize=7,
            color="white", xytext=(0, -2), textcoords="offset points",
        )  # fmt: skip


def scale(results: Results) -> Figure:
    """Steps against layers and batch, one layer against context, memory of a sequence against context."""
    sweeps = {
        sweep: sorted((row for row in results["rows"] if row["sweep"] == sweep), key=lambda row: row[sweep])
        for sweep in ("layers", "batch", "context")
    }
    figure, ((layers, batch), (context, memory)) = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    leave_room(figure)
    steps(layers, sweeps["layers"], "layers")
    steps(batch, sweeps["batch"], "batch")
    per_layer(context, sweeps["context"])
    memory_per_sequence(memory, sweeps["context"])
    return figure


def steps(axes: Axes, rows: Sequence[Row], key: str) -> None:
    """Time of a step, and the hop of a layer on an axis of its own."""
    xs = [row[key] for row in rows]
    axes.plot(xs, [row["step_us"] / 1e3 for row in rows], "o-", color=BLUE, label="step, three processes")
    axes.plot(
        xs, [row["step_us_embedded"] / 1e3 for row in rows], "s--", color=ORANGE, label="step, one process"
    )
    axes.set_ylabel("decode step, ms")
    axes.set_ylim(bottom=0)
    fixed = {"layers": f"batch 1, context {rows[0]['context']:,}", "batch": f"context {rows[0]['context']:,}"}
    titles = {"layers": "layers", "batch": "sequences"}
    axes.set_title(f"against {titles[key]} ({fixed[key]})" if rows else titles[key], fontsize=9)
    axes.set_xlabel(titles[key])
    if key == "batch":
        axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.minorticks_off()
    right = axes.twinx()
    right.plot(xs, [row["hop_us_p50"] for row in rows], "^:", color=RED, label="hop of a layer")
    right.set_ylabel("hop of a layer, µs", color=RED)
    right.set_ylim(0, 2.5 * max(row["hop_us_p50"] for row in rows))
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper left", fontsize=7.5)


def per_layer(axes: Axes, rows: Sequence[Row]) -> None:
    """Kernels and hop of one layer, both scales logarithmic."""
    xs = [row["context"] for row in rows]
    lines = (
        ("kernel_us_p50_full", "full-attention kernel", "o-", BLUE),
        ("kernel_us_p50_linear", "linear-attention kernel", "s-", GREEN),
        ("hop_us_p50", "hop", "^:", RED),
    )
    for key, label, style, colour in lines:
        axes.plot(xs, [row[key] for row in rows], style, color=colour, label=label)
    logarithmic(axes, xs)
    axes.set_yscale("log")
    axes.set_ylabel("one layer of a decode step, µs")
    axes.set_title("against context (batch 1)", fontsize=9)
    axes.legend(fontsize=7.5)


def memory_per_sequence(axes: Axes, rows: Sequence[Row]) -> None:
    """What the pools hand out, and what the plan says."""
    xs = [row["context"] for row in rows]
    mebibyte = 1 << 20
    axes.plot(
        xs, [row["memory_bytes"] / mebibyte for row in rows], "o-", color=BLUE, label="pages and states held"
    )
    axes.plot(
        xs,
        [row["memory_bytes_planned"] / mebibyte for row in rows],
        "s--",
        color=ORANGE,
        label="plan: tokens and one version of the state",
    )
    axes.plot(
        xs, [row["memory_state_bytes"] / mebibyte for row in rows], "^:", color=GREEN, label="states held"
    )
    logarithmic(axes, xs)
    axes.set_yscale("log")
    axes.set_ylabel("memory of one sequence, MiB")
    axes.set_title("against context", fontsize=9)
    axes.legend(fontsize=7.5)


def logarithmic(axes: Axes, contexts: Sequence[int]) -> None:
    """Contexts on a logarithmic axis, each with its number."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{x // 1024}k" if x % 1024 == 0 else f"{x:,}" for x in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")


def overlap(results: Results) -> Figure:
    """How many times as fast as one lane: two lanes, and what the cell chose; and how long the body waits."""
    rows = results["rows"]
    figure, (speed, waiting) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    leave_room(figure)
    places = range(len(rows))
    bars_of = (
        ("one_lane", "one lane", GREY),
        ("two_lanes", "two lanes", BLUE),
        ("auto", "as decided", ORANGE),
    )
    for number, (name, label, colour) in enumerate(bars_of):
        at = [place + (number - 1) * 0.27 for place in places]
        ratios = [row.get(f"ratio_{name}", 1.0) for row in rows]
        shown = speed.bar(at, ratios, width=0.25, color=colour, label=label)
        speed.bar_label(shown, fmt="%.2f", fontsize=7, padding=1)
        waiting.bar(at, [100 * row[f"waiting_{name}"] for row in rows], width=0.25, color=colour)
    speed.axhline(1, color="#444444", linewidth=0.8)
    speed.set_ylabel("speed, one lane = 1")
    speed.margins(y=0.12)
    waiting.set_ylabel("body waits for layers,\n% of the step")
    titles = [f"{row['phase']}\nbatch {row['batch']}\ncontext {row['context']:,}" for row in rows]
    waiting.set_xticks(places, titles, fontsize=7.5)
    for axes in (speed, waiting):
        axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=len(bars_of), fontsize=7.5)
    return figure


def serve(results: Results) -> Figure:
    """Percentiles of the times of requests, one at a time and under load, each on a logarithmic scale."""
    names = (("ttft_ms", "time to first token"), ("itl_ms", "between tokens"), ("e2e_ms", "whole request"))
    figure, panels = plt.subplots(1, len(names), figsize=(9, 3.2), layout="constrained")
    leave_room(figure)
    percents = (50, 90, 95, 99)
    for axes, (name, title) in zip(panels, names, strict=True):
        for row, colour in zip(results["rows"], (GREY, BLUE, ORANGE, GREEN), strict=False):
            values = [row[f"{name}_p{percent}"] for percent in percents]
            label = f"{row['load']}, {row['tokens_per_s']:,.0f} tokens/s"
            axes.plot(range(len(percents)), values, "o-", color=colour, label=label)
        axes.set_yscale("log")
        axes.set_xticks(range(len(percents)), [f"p{percent}" for percent in percents])
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("milliseconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=7.5)
    return figure


PICTURES: Mapping[str, Callable[[Results], Figure]] = {
    "decode": throughput,
    "prefill": throughput,
    "hop": hop,
    "scale": scale,
    "overlap": overlap,
    "serve": serve,
}


if __name__ == "__main__":
    sys.exit(main())
