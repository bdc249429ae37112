"""The model card: a README that the Hugging Face hub shows, written from what is on record and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .manifest import Artifact, Manifest, ParityRecord
from .spec import SamplerSpec

HUB_LICENCES = {
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail", "creativeml-openrail-m", "openrail++", "unlicense",
}  # fmt: skip
"""Licences that the hub knows by these names; any other is shown as ``other`` with its own name."""


def bundle_card(manifest: Manifest, *, quality: Sequence[Mapping[str, Any]] = (), where: str = "") -> str:
    """Return the card of a bundle.

    Args:
        manifest: What it holds.
        quality: Kept scores, as ``report.quality.read_quality`` returns them.
        where: Path or hub id in the usage lines.
    """
    return model_card(
        manifest.name, manifest.samplers, manifest.provenance, artifacts=manifest.artifacts, parity=manifest.parity,
        budgets=manifest.budgets, quality=quality, where=where,
    )  # fmt: skip


def model_card(
    name: str,
    specs: Sequence[SamplerSpec],
    provenance: Mapping[str, Any],
    *,
    artifacts: Sequence[Artifact] = (),
    parity: Sequence[ParityRecord] = (),
    budgets: Sequence[str] = (),
    quality: Sequence[Mapping[str, Any]] = (),
    where: str = "",
) -> str:
    """Return a card as Markdown with a YAML head.

    Args:
        name: Human name of the model.
        specs: Its samplers.
        provenance: Data, licence, recipe; ``license`` goes into the head.
        artifacts: What can be run; () for a checkpoint, which PyTorch runs.
        parity: Measured comparisons.
        budgets: Latencies that it must keep.
        quality: Kept scores.
        where: Path or hub id in the usage lines.
    """
    licence = str(provenance.get("license") or provenance.get("licence") or "")
    licence = "" if licence.lower() == "other" else licence  # what training writes where nobody named one
    scores = [score for score in quality if _metrics(score)]
    sections = [
        _head(name, specs[0], licence, scores, onnx=any(a.format == "onnx" for a in artifacts)),
        f"# {_cell(name)}",
        "A continuous-time consistency model (sCM, [arXiv 2410.11081](https://arxiv.org/abs/2410.11081)): noise "
        f"becomes a sample in {_steps(specs)} network calls.",
        _usage(specs[0], where or "path/to/this/folder", artifacts),
        _table({"": ""} | _facts(specs)),
        _runs(artifacts, parity),
        _quality(scores),
        "\n".join(["## Latency it must keep", "", *(f"- `{_cell(text)}`" for text in budgets)]) if budgets else "",
        _licence(licence),
        _table({"Provenance": ""} | {str(key): str(value) for key, value in provenance.items()}) if provenance else "",
        "Files and hashes are listed in `scm_manifest.json`; `scm-export bundle verify` checks them. Nothing here is a "
        "pickle." if artifacts else "Nothing here is a pickle.",
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(name: str, spec: SamplerSpec, licence: str, scores: Sequence[Mapping[str, Any]], *, onnx: bool) -> str:
    known = licence.lower() in HUB_LICENCES
    head: dict[str, Any] = {
        "library_name": "scm-sdk",
        "license": licence.lower() if known else "other",
        "tags": ["consistency-model", "scm", *(["onnx"] if onnx else [])],
    }
    if licence and not known:
        head["license_name"] = licence
    if spec.output == "pixels" and len(spec.image_shape) == 3 and not spec.conditioning:
        head["pipeline_tag"] = "unconditional-image-generation"
    if scores:
        results = [
            {
                "task": {"type": "unconditional-image-generation"},
                "dataset": {"name": "held-out pictures", "type": "other"},
                "metrics": [
                    {"type": key, "value": value, "name": f"{key}, {score['sampler']}"}
                    for key, value in _metrics(score).items()
                ],
            }
            for score in scores
        ]
        head["model-index"] = [{"name": name, "results": results}]
    # JSON is YAML, so that no name can leave its place.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    return "\n".join(["---", *lines, "---"])


def _usage(spec: SamplerSpec, where: str, artifacts: Sequence[Artifact]) -> str:
    arguments = ["num_images=4"]
    if spec.num_classes:
        arguments.append(f"class_labels={spec.class_names[0] if spec.class_names else 0!r}")
    if spec.guidance_range is not None:
        arguments.append("guidance_scale=1.5" if spec.guidance_range[0] <= 1.5 <= spec.guidance_range[1] else "")
    call = ", ".join([*filter(None, arguments), "seed=0"])
    extra = "onnxruntime" if any(a.format == "onnx" for a in artifacts) else "torch"
    pictures = spec.output == "pixels" and len(spec.image_shape) == 3 and spec.image_shape[0] in (1, 3)
    kind = "" if pictures else ', output_type="raw"'
    return f"""## Usage

```sh
pip install 'scm-sdk[{extra},hub]'
```

```python
from scm_sdk import Generator

with Generator.from_pretrained({json.dumps(where)}) as gen:
    images = gen({call}{kind}).images
```

A seed names a sample for ever, whatever the batch, the backend or the machine."""


def _facts(specs: Sequence[SamplerSpec]) -> dict[str, str]:
    spec = specs[0]
    shown = ", ".join(spec.class_names[:20]) + (", …" if len(spec.class_names) > 20 else "")
    return {
        "steps": ", ".join(f"{s.num_inference_steps} (t = {', '.join(f'{t:.4f}' for t in s.times)})" for s in specs),
        "sample": f"{spec.output}, {' x '.join(map(str, spec.image_shape))}",
        "labels": shown or (f"0..{spec.num_classes - 1}" if spec.num_classes else "none"),
        "sigma_data": str(spec.sigma_data),
    }


def _runs(artifacts: Sequence[Artifact], parity: Sequence[ParityRecord]) -> str:
    if not artifacts:
        return ""
    rows = []
    for artifact in artifacts:
        records = [r for r in parity if r.artifact == artifact.path]
        found = "; ".join(
            f"{r.backend}: {r.finding}{'' if r.passed else ' (FAILED)'}{f' (loosened: {r.reason})' if r.reason else ''}"
            for r in records
        )
        steps = str(artifact.num_inference_steps or "any")
        rows.append(
            [
                artifact.path,
                artifact.format,
                artifact.precision,
                steps,
                found or ("the reference" if artifact.format == "safetensors" else "not compared"),
            ]
        )
    head = ["| artifact | format | precision | steps | against PyTorch, same noise |", "|---|---|---|---|---|"]
    return "\n".join(["## What runs", "", *head, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)])


def _quality(scores: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for score in scores:
        quality = score["quality"]
        values = ", ".join(f"{key} {value:.4g}" for key, value in _metrics(score).items())
        against = f"{quality.get('num_generated', '?')} pictures, held-out real ones"
        lines.append(f"- {_cell(str(score['sampler']))}: {_cell(values)} ({_cell(against)})")
    return "\n".join(["## Quality", "", *lines]) if lines else ""


def _metrics(score: Mapping[str, Any]) -> dict[str, float]:
    quality = score.get("quality", {})
    named = {str(quality.get("metric", "FD")): quality.get("fd"), "KID": quality.get("kid"),
             "precision": quality.get("precision"), "recall": quality.get("recall")}  # fmt: skip
    return {key: float(value) for key, value in named.items() if isinstance(value, int | float)}


def _licence(licence: str) -> str:
    if not licence:
        return "## Licence\n\nNone is on record. Ask who made the weights before you use them."
    free = "-nc" in licence.lower()
    note = " Non-commercial: the weights, and pictures where its terms say so, may not be sold." if free else ""
    return f"## Licence\n\n{_cell(licence)}.{note}"


def _steps(specs: Sequence[SamplerSpec]) -> str:
    return " or ".join(str(spec.num_inference_steps) for spec in specs)


def _table(rows: Mapping[str, str]) -> str:
    first, *rest = rows.items()
    lines = [f"| {first[0]} | {first[1]} |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rest)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a text that stays in its line and its cell, and is no HTML."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
