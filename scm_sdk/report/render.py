"""Turn what was collected into pages: one HTML file that loads nothing, Markdown, JSON."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from .._lazy import require
from ..files import atomic_write_bytes
from ..images import make_grid, to_uint8
from ..manifest import ParityRecord
from . import figures
from .collect import Pictures, Report

_COLUMNS = 16
_AMPLIFY = 10.0
_LARGEST_WIDTH = 1600


def write_report(report: Report, path: Path) -> tuple[Path, Path, Path]:
    """Write the three forms side by side and return their paths: HTML, Markdown, JSON.

    Args:
        report: What was collected.
        path: The HTML file; the others get its name with their own ending.

    Raises:
        BackendUnavailable: If jinja2 or matplotlib is not installed.
        ScmError: If a file cannot be written.
    """
    context = _context(report)
    forms = {
        ".html": _template("report.html.j2", escape=True).render(**context, **_html_only(report)),
        ".md": _template("report.md.j2", escape=False).render(**context),
        ".json": json.dumps(report.to_dict(), indent=2) + "\n",
    }
    for suffix, text in forms.items():
        atomic_write_bytes(path.with_suffix(suffix), text.encode())
    return path.with_suffix(".html"), path.with_suffix(".md"), path.with_suffix(".json")


def _template(name: str, *, escape: bool) -> Any:
    jinja2 = require("jinja2", extra="report", purpose="a report")
    loader = jinja2.PackageLoader("scm_sdk.report", "")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _context(report: Report) -> dict[str, Any]:
    records = report.manifest.parity
    failed = sum(not record.passed for record in records)
    if not records:
        verdict = {"kind": "none", "text": "not validated"}
    elif failed:
        verdict = {"kind": "fail", "text": f"{failed} of {len(records)} comparisons failed"}
    else:
        verdict = {"kind": "pass", "text": f"validated: {len(records)} of {len(records)} comparisons passed"}
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
    ladder = [{**_plain(record), "finding": record.finding, "origin": _origin(record)} for record in records]
    return {"report": report, "verdict": verdict, "engines": engines, "ladder": ladder, "version": __version__}


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
        {"value": " and ".join(map(str, report.steps)), "text": "network calls for an image"},
        {"value": f"{total / 1e6:.1f} MB", "text": f"{len(report.manifest.files)} files, each with its sha256"},
        {"value": str(len(report.engines)), "text": "engines"},
    ]
    if report.latencies:
        fastest = min(report.latencies[0], key=lambda timing: timing.median_ms)
        cards.append(
            {
                "value": f"{fastest.median_ms:.2f} ms",
                "text": f"{fastest.name}, batch {report.latencies[0].batch}: {fastest.speedup:.1f}× PyTorch",
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
    from PIL import Image

    finite = np.nan_to_num(images, nan=value_range[0], posinf=value_range[1], neginf=value_range[0])
    columns = min(_COLUMNS, len(images))
    scale = max(1, min(4, _LARGEST_WIDTH // (columns * images.shape[-1])))
    sheet = make_grid(to_uint8(finite.astype(np.float32), value_range), columns, scale, padding=2)
    stream = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(stream, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _origin(record: ParityRecord) -> str:
    if record.reason:
        return f"set by hand: {record.reason}"
    if record.gate == "psnr_db":
        return "the gate's least PSNR for this precision"
    return f"derived from the noise floor {record.noise_floor:.1e}: PyTorch beside itself"


def _census(census: dict[str, Any]) -> str:
    built = census.get("built")
    if not built:
        return "kernels unknown"
    parts = [f"{count} convolutions {name}" for name, count in built["convolutions"].items()]
    parts.append(f"{built['attention_fused']} of {built['attention']} attention blocks fused")
    return ", ".join(parts + [f"MISMATCH: {text}" for text in census.get("mismatches", [])])


def _plain(record: ParityRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}
