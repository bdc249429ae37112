"""The figures of a report as SVG: differences, error histograms, latency, provenance."""

from __future__ import annotations

import io
from itertools import cycle
from typing import Any

import numpy as np

from .._util.lazy import require
from ..bundle.manifest import Manifest
from .collect import Report

COLORS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#0891b2", "#65a30d", "#be185d")
_INK = "#475569"
_ARROW = {"arrowstyle": "->", "color": "#94a3b8", "lw": 0.8}
_LETTER, _GAP = 0.068, 0.6
"""Dimensions of the provenance figure, inches: a letter at 8 points, and the gap for arrows between two columns."""


def psnr_bars(report: Report) -> str:
    """PSNR of each artifact and PyTorch, dB; higher is closer."""
    rows = [(f"{p.name}, {p.steps} step{'s' * (p.steps > 1)}", p.difference.psnr_db, p.precision)
            for p in report.pictures if p.difference is not None]  # fmt: skip
    figure, axes = _figure(7, 0.8 + 0.34 * len(rows))
    shown = [min(value, 160.0) if np.isfinite(value) or value > 0 else 0.0 for _, value, _ in rows]
    order = {precision: i for i, precision in enumerate(dict.fromkeys(p for *_, p in rows))}
    axes.barh(range(len(rows)), shown, color=[COLORS[order[p] % len(COLORS)] for *_, p in rows], height=0.62)
    for i, value in enumerate(shown):
        said = "NaN" if np.isnan(rows[i][1]) else f"{rows[i][1]:.1f} dB"
        axes.text(value + 1, i, said, va="center", fontsize=9, color=_INK)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_xlim(0, max([1.0, *shown]) * 1.15)
    axes.set_xlabel("PSNR vs PyTorch fp32, dB")
    axes.invert_yaxis()
    return _svg(figure, "PSNR of each artifact")


def error_histogram(report: Report, steps: int) -> str:
    """Histogram of the errors of single values on a logarithmic axis; every value is in a bin."""
    figure, axes = _figure(7, 2.9)
    reference = next(p.images for p in report.pictures if p.steps == steps and p.difference is None)
    edges = np.logspace(-9, 1, 90)
    sigma = report.spec(steps).sigma_data
    shown = [p for p in report.pictures if p.steps == steps and p.difference is not None]
    for color, each in zip(cycle(COLORS), shown, strict=False):
        errors = np.abs(each.images.astype(np.float64) - reference).ravel() / sigma
        errors = np.nan_to_num(errors, nan=edges[-1])  # NaN and values beyond the axis are in the last bin
        counts, _ = np.histogram(np.clip(errors, edges[0], edges[-1]), bins=edges)
        axes.stairs(counts / errors.size, edges, fill=True, alpha=0.25, color=color)
        axes.stairs(counts / errors.size, edges, color=color, label=each.name, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xlabel("absolute error of one value, units of sigma_data (left end: equal; right end: more, or NaN)")
    axes.set_ylabel("share of values")
    if shown:
        _legend(axes)
    return _svg(figure, "Histogram of errors")


def throughput(report: Report) -> str:
    """Images per second by batch size."""
    figure, axes = _figure(7, 3.0)
    batches = [latency.batch for latency in report.latencies]
    names = [timing.name for timing in report.latencies[0]] if report.latencies else []
    for color, name in zip(cycle(COLORS), names, strict=False):
        axes.plot(batches, [latency[name].images_per_s for latency in report.latencies], "o-", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch")
    axes.set_ylabel(f"images/s, {report.timed_steps} steps")
    _legend(axes)
    return _svg(figure, "Throughput against batch")


def _legend(axes: Any) -> None:
    """Place the names of the curves above them, without covering a curve."""
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


def latency_strips(report: Report) -> str:
    """Every measured call at the smallest batch, and the medians."""
    latency = report.latencies[0]
    figure, axes = _figure(7, 0.9 + 0.4 * len(latency))
    draw = np.random.default_rng(0)
    for i, timing in enumerate(latency):
        times = np.array(timing.samples_ms)
        axes.plot(times, i + draw.uniform(-0.16, 0.16, len(times)), ".", color=COLORS[i % len(COLORS)], alpha=0.5)
        axes.plot([timing.median_ms] * 2, [i - 0.32, i + 0.32], color=COLORS[i % len(COLORS)], linewidth=2)
    axes.set_yticks(range(len(latency)), [timing.name for timing in latency])
    axes.set_xlim(left=0)
    axes.set_xlabel(f"ms for a batch of {latency.batch}, {report.timed_steps} steps; line: median")
    axes.invert_yaxis()
    return _svg(figure, "Latency samples")


def provenance(manifest: Manifest) -> str:
    """Dependency graph of the files: sources on the left."""
    sources = {entry.path: entry.built_from for entry in manifest.files}
    shown = [path for path, entry in sources.items() if entry or any(path in s for s in sources.values())]
    depth: dict[str, int] = {}

    def depth_of(path: str) -> int:
        if path not in depth:
            depth[path] = 0
            depth[path] = 1 + max((depth_of(source) for source in sources.get(path, ())), default=-1)
        return depth[path]

    columns: dict[int, list[str]] = {}
    for path in shown:
        columns.setdefault(depth_of(path), []).append(path)
    tallest = max((len(column) for column in columns.values()), default=1)
    place, right = {}, 0.0  # x in inches
    for _, column in sorted(columns.items()):
        for i, path in enumerate(column):
            place[path] = (right, (i + 0.5) / len(column))
        right += max(len(path) for path in column) * _LETTER + _GAP
    width = max(right - _GAP, 1.0)
    figure, axes = _figure(width + 0.1, 0.6 + 0.34 * tallest)
    for path in shown:
        for source in place.keys() & sources[path]:
            (x0, y0), (x1, y1) = place[source], place[path]
            axes.annotate("", (x1 - 0.04, y1), (x0 + len(source) * _LETTER + 0.04, y0), arrowprops=_ARROW)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # a passing arrow does not cross the text
    for path, (x, y) in place.items():
        axes.text(x, y, path, fontsize=8, va="center", color="#0f172a", parse_math=False, bbox=behind)
    axes.set_xlim(-0.05, width + 0.05)
    axes.set_ylim(1.02, -0.02)
    axes.axis("off")
    return _svg(figure, "Provenance of the files")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    require("matplotlib", extra="report", purpose="a report's figures")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#cbd5e1")
    axes.tick_params(colors=_INK, labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Title": title}, transparent=True)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
