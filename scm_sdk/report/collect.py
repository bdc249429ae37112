"""Collect the content of a report: records of the bundle, and current comparisons and timings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .._util.events import SILENT, Events
from .._util.lazy import installed_version
from .._util.machine import describe_machine
from .._version import __version__
from ..bundle.bundle import Bundle
from ..bundle.engine_record import BUILD_RECORD_NAME, BuildRecord
from ..bundle.manifest import Manifest
from ..bundle.scores import read_scores
from ..bundle.status import ModelStatus
from ..errors import BackendUnavailable, ConfigError, IncompatibleEngineError
from ..evaluate.selfcheck import Check, selfcheck
from ..inference.backends import BACKENDS, backend_info
from ..inference.generator import Generator
from ..inference.latency import Latency, measure
from ..inference.parity.difference import Difference, difference
from ..inference.parity.reference import Side
from ..inference.request import Request, make_request
from ..spec import Precision, SamplerSpec


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images of one artifact for the seeds of the report.

    Attributes:
        name: ``<backend> <precision>``.
        steps: Number of steps.
        precision: Precision of the artifact.
        artifact: Path of the artifact.
        images: ``(N, *image_shape)`` float32, data units.
        difference: Difference from the reference; None for the reference.
    """

    name: str
    steps: int
    precision: Precision
    artifact: str
    images: NDArray[np.float32]
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Content of a report.

    Attributes:
        path: The bundle.
        manifest: Manifest of the bundle.
        seeds: Seeds of the images.
        labels: Names of their labels, or ().
        pictures: Images of every artifact that runs here, the reference first for each number of steps.
        latencies: One per batch size, for everything that runs here with ``timed_steps``.
        timed_steps: Steps of the timed samplers.
        engines: Build record of each engine, by path.
        left_out: Reason why an artifact has no images, one line each.
        machine: Description of the machine.
        status: State of the model: its kind, the length of its training, whether its quality was measured.
        date: Date of the report, UTC, ``YYYY-MM-DD HH:MM``.
        versions: Versions of scm-sdk and of the libraries that ran the model, by import name.
        card: The model card, Markdown; "" if the bundle has none.
        checks: Self-checks of PyTorch and of each backend, by name; for ``timed_steps``.
        quality: Stored scores, as ``evaluate --keep`` wrote them.
    """

    path: Path
    manifest: Manifest
    seeds: tuple[int, ...]
    labels: tuple[str, ...]
    pictures: tuple[Pictures, ...]
    latencies: tuple[Latency, ...]
    timed_steps: int
    engines: dict[str, BuildRecord]
    left_out: tuple[str, ...]
    machine: dict[str, str]
    status: ModelStatus
    date: str
    versions: dict[str, str]
    card: str = ""
    checks: dict[str, tuple[Check, ...]] = field(default_factory=dict)
    quality: list[dict[str, Any]] = field(default_factory=list)

    def spec(self, steps: int) -> SamplerSpec:
        """Return the sampler of a number of steps."""
        return next(s for s in self.manifest.samplers if s.num_inference_steps == steps)

    @property
    def steps(self) -> list[int]:
        """Numbers of steps that have images."""
        return sorted({each.steps for each in self.pictures})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: everything except the images."""
        return {
            "bundle": str(self.path),
            "manifest": msgspec.to_builtins(self.manifest),
            "seeds": list(self.seeds),
            "measured_here": [
                {
                    "name": each.name,
                    "steps": each.steps,
                    "artifact": each.artifact,
                    "difference": each.difference.to_dict() if each.difference else None,
                }
                for each in self.pictures
            ],
            "latency": [latency.to_dict() for latency in self.latencies],
            "engines": {path: msgspec.to_builtins(record) for path, record in self.engines.items()},
            "left_out": list(self.left_out),
            "machine": self.machine,
            "status": self.status.to_dict(),
            "date": self.date,
            "versions": self.versions,
            "checks": {name: [check.to_dict() for check in checks] for name, checks in self.checks.items()},
            "quality": self.quality,
        }


def collect(
    path: Path,
    *,
    backends: Sequence[str] = (),
    num_images: int = 32,
    batches: Sequence[int] = (1, 8, 32),
    rounds: int = 20,
    checks: bool = True,
    events: Events = SILENT,
) -> Report:
    """Run everything that can run here and collect the records of the bundle.

    Args:
        path: The bundle.
        backends: Backends to run in addition to PyTorch; () is every one that can run here.
        num_images: Number of images of each artifact.
        batches: Batch sizes to time; those above the largest batch of the samplers are dropped.
        rounds: Interleaved rounds of each; 0 for no timing.
        checks: Whether to run the self-checks of each backend.
        events: Receives the stages.

    Raises:
        BundleError: If the bundle is damaged.
        ConfigError: If it has no checkpoint to compare with, its samples are not images, or a backend is unknown.
        BackendError: If PyTorch, which runs the reference, is not installed.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    spec = manifest.samplers[0]
    if not bundle.artifacts(format="safetensors"):
        note = manifest.cut_note or " Make it from one: scm-export onnx"
        raise ConfigError(f"{path} holds no checkpoint to compare with.{note}")
    if spec.output != "pixels" or len(spec.image_shape) != 3 or spec.image_shape[0] not in (1, 3):
        raise ConfigError(f"{path} makes {spec.output} {spec.image_shape}, expected pictures of 1 or 3 channels.")
    for name in backends:
        backend_info(name)
    seeds = tuple(range(num_images))
    labels = [i % spec.num_classes for i in seeds] if spec.num_classes else None
    pictures, left_out = [], []
    for sampler in manifest.samplers:
        steps = sampler.num_inference_steps
        events.stage(f"{num_images} images in {steps} step{'s' * (steps > 1)} by torch fp32")
        with Generator.from_pretrained(path, backend="torch", num_inference_steps=steps, verify="none") as gen:
            wanted = _draw(gen, make_request(sampler, num_images=num_images, seed=list(seeds), class_labels=labels))
            row = gen.opened().row
        pictures.append(Pictures(name="torch fp32", steps=steps, precision="fp32", artifact=row.artifact, images=wanted,
                                 difference=None))  # fmt: skip
        for backend, precision in _pairs(bundle, steps, backends):
            events.stage(f"{num_images} images in {steps} step{'s' * (steps > 1)} by {backend} {precision}")
            try:
                with _open(path, backend, precision, steps) as gen:
                    images = _draw(
                        gen, make_request(sampler, num_images=num_images, seed=list(seeds), class_labels=labels)
                    )
                    row = gen.opened().row
            except (BackendUnavailable, IncompatibleEngineError) as exc:
                left_out.append(str(exc))
                continue
            pictures.append(
                Pictures(
                    name=f"{backend} {precision}",
                    steps=steps,
                    precision=precision,
                    artifact=row.artifact,
                    images=images,
                    difference=difference(images, wanted, seeds, sampler),
                )
            )
    timed = max(s.num_inference_steps for s in manifest.samplers)
    return Report(
        path=path,
        manifest=manifest,
        seeds=seeds,
        labels=tuple(spec.class_names[i] for i in labels) if labels and spec.class_names else (),
        pictures=tuple(pictures),
        latencies=_time(path, [p for p in pictures if p.steps == timed], batches, rounds, events) if rounds else (),
        timed_steps=timed,
        engines=_records(bundle),
        left_out=tuple(left_out),
        machine=describe_machine(),
        status=bundle.status,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        versions=_versions(pictures),
        card=_card(bundle),
        checks=_checks(path, [p for p in pictures if p.steps == timed], events) if checks else {},
        quality=read_scores(bundle.path, manifest),
    )


def _versions(pictures: list[Pictures]) -> dict[str, str]:
    libraries = sorted({BACKENDS[each.name.split()[0]].library for each in pictures})
    return {"scm_sdk": __version__, **{library: installed_version(library) for library in libraries}}


def _draw(generator: Generator, request: Request) -> NDArray[np.float32]:
    """Return the images of a request without checks: NaN is shown in a report, not refused."""
    side = Side.of(generator, None)
    return side.run(request, side.spec.max_batch)


def _card(bundle: Bundle) -> str:
    cards = [entry.path for entry in bundle.manifest.files if entry.role == "card"]
    return bundle.file(cards[0]).read_text(encoding="utf-8", errors="replace") if cards else ""


def _checks(path: Path, pictures: list[Pictures], events: Events) -> dict[str, tuple[Check, ...]]:
    found = {}
    for each in pictures:
        events.stage(f"self-checks of {each.name}")
        with _open(path, each.name.split()[0], each.precision, each.steps) as generator:
            found[each.name] = tuple(selfcheck(generator, num_samples=4))
    return found


def _pairs(bundle: Bundle, steps: int, backends: Sequence[str]) -> list[tuple[str, Precision]]:
    """Return each wanted pair of backend and precision for a number of steps, once."""
    found = {
        (name, a.precision): None
        for a in bundle.manifest.artifacts
        for name, info in BACKENDS.items()
        if a.num_inference_steps == steps and info.takes(a) and (not backends or name in backends)
    }
    return list(found)  # pyright: ignore[reportReturnType]


def _open(path: Path, backend: str, precision: Precision, steps: int) -> Generator:
    with warnings.catch_warnings():  # the report shows that it failed its gate
        warnings.filterwarnings("ignore", message=".*recorded parity failed", category=RuntimeWarning)
        return Generator.from_pretrained(
            path, backend=backend, precision=precision, num_inference_steps=steps, verify="none"
        )


def _time(
    path: Path, pictures: list[Pictures], batches: Sequence[int], rounds: int, events: Events
) -> tuple[Latency, ...]:
    with ExitStack() as stack:
        opened = {
            each.name: stack.enter_context(_open(path, each.name.split()[0], each.precision, each.steps))
            for each in pictures
        }
        most = min(generator.opened().spec.max_batch for generator in opened.values())
        results = []
        for batch in (b for b in batches if b <= most):
            events.stage(f"time {len(opened)} backends, batch {batch}, {rounds} rounds")
            results.append(measure(opened, batch=batch, rounds=rounds))
        return tuple(results)


def _records(bundle: Bundle) -> dict[str, BuildRecord]:
    found = {}
    for artifact in bundle.manifest.artifacts:
        if artifact.engine is not None:
            record = bundle.file(artifact.path).with_name(BUILD_RECORD_NAME)
            found[artifact.path] = BuildRecord.from_json(record.read_bytes())
    return found
