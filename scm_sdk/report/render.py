"""Render a report: one self-contained HTML file, Markdown, JSON."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._util.files import atomic_write_bytes
from .._util.lazy import require
from .._version import __version__
from ..bundle.card import markdown_text
from ..bundle.manifest import Artifact, Manifest, ParityRecord
from ..images import encode_picture, make_grid, to_uint8
from ..inference.parity.compare import FLOOR_FACTOR, ROUNDING_FLOOR
from . import figures
from .collect import Pictures, Report

_COLUMNS = 8
_AMPLIFY = 10.0
_LARGEST_WIDTH = 1600
GLOSSARY = {
    "artifact": "a file that a backend runs: a graph or an engine, in one precision and for one number of steps",
    "step": "one network call; a consistency model makes an image in one or two",
    "PSNR": "peak signal-to-noise ratio of an image and its reference, dB; higher is closer",
    "sigma_data": "standard deviation of the training data; differences are given in this unit",
    "noise floor": "largest difference of the PyTorch checkpoint from itself on the samples that are compared: in "
    "other batch splits, and in reruns on noise of which each value is moved by one unit in the last place",
    "threshold": f"fp32 passes if its largest difference is at most {FLOOR_FACTOR:g} noise floors, or "
    f"{ROUNDING_FLOOR:g} if that is more; a lower precision passes unless it is certain (95 % confidence) that fewer "
    "than 95 % of the images reach its PSNR",
    "SSIM": "structural similarity of two images; 1 is equal",
    "seed": "number from which the noise of an image is made; the same on every backend",
    "FD, KID": "distances between the features of generated and of real pictures; lower is better",
    "precision, recall": "of quality: share of generated pictures near real ones, and of real near generated ones",
    "engine": "a TensorRT program, built for one kind of GPU",
    "kernels": "GPU programs that an engine runs; counted from the build log and compared with the graph",
}
"""Glossary of the report."""


def paths_of(path: Path) -> tuple[Path, Path, Path]:
    """Return the paths of a report from its HTML path: HTML, Markdown, JSON."""
    return path.with_suffix(".html"), path.with_suffix(".md"), path.with_suffix(".json")


def write_report(report: Report, path: Path) -> tuple[Path, Path, Path]:
    """Write the three files and return their paths: HTML, Markdown, JSON.

    Args:
        report: The collected report.
        path: The HTML file; the others have the same name with another extension.

    Raises:
        BackendUnavailable: If jinja2 or matplotlib is not installed.
        ScmError: If a file cannot be written.
    """
    context = _context(report)
    forms = (
        _template("report.html.j2", escape=True).render(**context, **_html_only(report)),
        _template("report.md.j2", escape=False).render(**context),
        json.dumps(report.to_dict(), indent=2) + "\n",
    )
    paths = paths_of(path)
    for file, text in zip(paths, forms, strict=True):
        atomic_write_bytes(file, text.encode())
    return paths


def _template(name: str, *, escape: bool) -> Any:
    jinja2 = require("jinja2", extra="report", purpose="a report")
    loader = jinja2.PackageLoader("scm_sdk.report", "")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=escape,
        finalize=None if escape else lambda value: markdown_text(value) if isinstance(value, str) else value,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _context(report: Report) -> dict[str, Any]:
    records = report.manifest.parity
    engines = [
        {
            "path": path,
            "target": ", ".join(record.facts.compute_capabilities),
            "megabytes": f"{record.engine_bytes / 1e6:.1f}",
            "seconds": f"{record.seconds.get('build', 0.0):.1f}",
            "census": _census(record.census),
        }
        for path, record in report.engines.items()
    ]
    parity = [
        {**_plain(record), "way": record.way, "finding": record.finding, "origin": _origin(record)}
        for record in records
    ]
    return {
        "report": report,
        "verdict": verdict(report.manifest),
        "engines": engines,
        "parity": parity,
        "unproved": [artifact.path for artifact in unproved(report.manifest)],
        "checks": _check_rows(report),
        "glossary": GLOSSARY,
        "quality": [_quality(score) for score in report.quality],
        "next_steps": next_steps(report),
        "version": __version__,
    }


def verdict(manifest: Manifest) -> dict[str, str]:
    """Return the verdict on a bundle: ``kind`` (pass, fail or none) and ``text``.

    It passes only if each graph and engine has a recorded comparison, all passed, and no gate was loosened. Lower
    precisions in which a backend also computes them do not count.
    """
    there = {artifact.path for artifact in manifest.artifacts if artifact.format != "safetensors"}
    records = [record for record in manifest.parity if record.artifact in there and not record.precision]
    missing, loosened = unproved(manifest), sum(bool(record.reason) for record in records)
    if failed := sum(not record.passed for record in records):
        return {"kind": "fail", "text": f"{failed} of {len(records)} comparisons failed"}
    if not records:
        return {"kind": "none", "text": "not validated"}
    text = f"validated: {len(there) - len(missing)} of {len(there)} artifacts passed"
    if missing:
        engines = sum(artifact.engine is not None for artifact in missing)
        text += f"; {len(missing)} never compared" + (f" ({engines} of them engines that never ran)" if engines else "")
    if loosened:
        text += f"; {loosened} by a gate that was loosened manually"
    return {"kind": "none" if missing or loosened else "pass", "text": text}


def next_steps(report: Report) -> list[dict[str, str]]:
    """Return the next steps for a bundle, most urgent first: ``text`` and optionally a ``command``."""
    manifest, path = report.manifest, shlex.quote(str(report.path))
    steps = [{"text": text, "command": ""} for text in report.status.training_warnings]
    found = verdict(manifest)["kind"]
    if found == "fail":
        steps.append({
            "text": "Find the node at which a failed graph begins to differ.",
            "command": f"scm-export validate {path} --bisect faults",
        })  # fmt: skip
    missing = unproved(manifest)
    if any(artifact.engine is None for artifact in missing):
        steps.append({"text": "Compare every graph with PyTorch.", "command": f"scm-export validate {path}"})
    if any(artifact.engine is not None for artifact in missing):
        steps.append({
            "text": "Compare the engines with PyTorch on a machine with their GPU.",
            "command": f"scm-export validate {path}",
        })  # fmt: skip
    if not report.status.quality_measured:
        steps.append({
            "text": "Measure quality against held-out pictures.", "command": f"scm-export evaluate {path} --keep",
        })  # fmt: skip
    if not manifest.budgets:
        steps.append({
            "text": "Set a latency budget, for example 25 ms; validate enforces it from then on.",
            "command": f"scm-export bench {path} --budget p95=25ms@b1 --keep-budget",
        })  # fmt: skip
    if found == "pass":
        steps.append({"text": "Pack the bundle into one file.", "command": f"scm-export bundle pack {path}"})
    return steps


def unproved(manifest: Manifest) -> list[Artifact]:
    """Return the graphs and engines without a recorded comparison."""
    compared = {record.artifact for record in manifest.parity if not record.precision}
    return [a for a in manifest.artifacts if a.format != "safetensors" and a.path not in compared]


def _check_rows(report: Report) -> list[dict[str, Any]]:
    columns = list(report.checks.values())
    rows = zip(*columns, strict=True)
    return [
        {"name": row[0].name, "cells": row, "text": next((c.text for c in row if c.passed is not None), row[0].text)}
        for row in rows
    ]


def _quality(score: dict[str, Any]) -> dict[str, Any]:
    quality, labels = score["quality"], score.get("labels") or {}

    def with_interval(name: str) -> str:
        value, interval = quality.get(name), quality.get(f"{name}_interval")
        if value is None or interval is None:
            return "–"
        return f"{1e3 * value:.2f} ({1e3 * interval[0]:.2f} to {1e3 * interval[1]:.2f})"

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return {
        "sampler": score["sampler"],
        "metric": quality["metric"],
        "fd": number(quality["fd"], ".2f"),
        "floor": number(quality.get("fd_floor"), ".2f"),
        "kid": with_interval("kid"),
        "delta": with_interval("kid_delta"),
        "precision": number(quality.get("precision"), ".1%"),
        "recall": number(quality.get("recall"), ".1%"),
        "labels": number(labels.get("accuracy"), ".1%"),
        "count": f"{quality['num_generated']} against {quality['num_reference'] or 'statistics'}",
        "against": str(score.get("against") or "not on record"),
    }


def _html_only(report: Report) -> dict[str, Any]:
    measured = [p for p in report.pictures if p.difference is not None]
    spec = report.manifest.samplers[0]
    return {
        "cards": _cards(report),
        "measured": measured,
        "pictures": [{"title": f"{p.name}, {p.steps} step{'s' * (p.steps > 1)}"} for p in measured],
        "distinct": spec.num_classes,
        "steady": all(latency.stable for latency in report.latencies),
        "script": [_script(report, p) for p in measured],
        "figures": {
            "psnr": figures.psnr_bars(report),
            "histograms": [(f"{n} step{'s' * (n > 1)}", figures.error_histogram(report, n)) for n in report.steps],
            "latency": figures.latency_strips(report) if report.latencies else "",
            "throughput": figures.throughput(report) if report.latencies else "",
            "provenance": figures.provenance(report.manifest),
        },
    }


def _cards(report: Report) -> list[dict[str, str]]:
    total = sum(entry.size for entry in report.manifest.files)
    cards = [
        {"value": " and ".join(map(str, report.steps)), "text": "network calls per image"},
        {"value": f"{total / 1e6:.1f} MB", "text": f"{len(report.manifest.files)} files, each with its sha256"},
        {"value": str(len(report.engines)), "text": "engine" if len(report.engines) == 1 else "engines"},
    ]
    if report.latencies:
        fastest = min(report.latencies[0], key=lambda timing: timing.median_ms)
        steady = report.latencies[0].stable
        ratio = f"{fastest.speedup:.1f}× PyTorch, " if steady else ""  # ratios of unstable times are not meaningful
        cards.append(
            {
                "value": f"{fastest.median_ms:.2f} ms",
                "text": f"{fastest.name}, batch {report.latencies[0].batch}: {ratio}median of "
                f"{len(fastest.samples_ms)} rounds{'' if steady else '; the times were not stable'}",
            }
        )
    return cards


def _script(report: Report, pictures: Pictures) -> dict[str, str]:
    spec = report.spec(pictures.steps)
    reference = next(p.images for p in report.pictures if p.steps == pictures.steps and p.difference is None)
    low, high = spec.value_range
    gap = np.clip((low + high) / 2 + _AMPLIFY * (pictures.images - reference), low, high)
    assert pictures.difference is not None
    return {
        "reference": _grid(reference, spec.value_range),
        "image": _grid(pictures.images, spec.value_range),
        "gap": _grid(gap, spec.value_range),
        "said": f"{pictures.difference.psnr_db:.1f} dB, largest error {pictures.difference.max_abs:.1e} sigma_data "
        f"(seed {pictures.difference.worst_seed})",
    }


def _grid(images: NDArray[np.float32], value_range: tuple[float, float]) -> str:
    """Return a contact sheet as a data URL."""
    finite = np.nan_to_num(images, nan=value_range[0], posinf=value_range[1], neginf=value_range[0])
    columns = min(_COLUMNS, len(images))
    scale = max(1, min(4, _LARGEST_WIDTH // (columns * images.shape[-1])))
    sheet = make_grid(to_uint8(finite.astype(np.float32), value_range), columns, scale, padding=2)
    return "data:image/png;base64," + base64.b64encode(encode_picture(sheet, ".png")).decode()


def _origin(record: ParityRecord) -> str:
    if record.reason:
        return f"set manually: {record.reason}"
    if record.gate != "max_abs":
        return "minimum PSNR of this precision"
    return f"derived from the noise floor {record.noise_floor:.1e}: PyTorch compared with itself"


def _census(census: dict[str, Any]) -> str:
    built = census.get("built")
    if not built:
        return "kernels unknown"
    parts = [
        f"{count} {layers} {name}"
        for kind, layers in (("convolutions", "convolutions"), ("products", "matrix products"))
        for name, count in built.get(kind, {}).items()
    ]
    parts.append(f"{built['attention_fused']} of {built['attention']} attention blocks fused")
    return ", ".join(parts + [f"MISMATCH: {text}" for text in census.get("mismatches", [])])


def _plain(record: ParityRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}
