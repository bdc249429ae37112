"""Export a checkpoint to a bundle: weights, graphs, goldens, card and manifest."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scm_sdk._util.arguments import checked_names
from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.files import atomic_write_bytes, remove_leftovers, sha256_file
from scm_sdk._util.lazy import distribution_version
from scm_sdk._version import __version__
from scm_sdk.bundle.bundle import Bundle, publish_bundle, write_bundle
from scm_sdk.bundle.card import CARD_PATH, model_card
from scm_sdk.bundle.goldens import Golden, write_goldens
from scm_sdk.bundle.layout import (
    CONFIG_NAME,
    DECODER_PATH,
    ENCODER_PATH,
    FIRST_FRAME_PATH,
    FRAMES_PATH,
    NEXT_FRAMES_PATH,
)
from scm_sdk.bundle.manifest import MANIFEST_NAME, Artifact, ImageSize, Role, Size, describe_size, image_size
from scm_sdk.bundle.scheduler import SCHEDULER_PATH, scheduler_json
from scm_sdk.bundle.status import ModelStatus
from scm_sdk.bundle.verify import read_manifest
from scm_sdk.errors import BundleError, ConfigError, ScmError
from scm_sdk.inference.request import make_example
from scm_sdk.model.foreign.sana_folder import is_pipeline
from scm_sdk.spec import T_LIMIT, Renoise, SamplerSpec

from .graph.decoder import export_encoder, export_frame_decoder, write_decoder
from .graph.io import GRAPH_NAME, GraphReport, read_report, sized_name
from .graph.network import export_samplers
from .workspace import Workspace

if TYPE_CHECKING:
    from scm_sdk.model.consistency import ConsistencyModel

DENOISER = "denoiser"
NUM_GOLDENS = 4
LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")


@dataclass(frozen=True, kw_only=True)
class BundleReport:
    """Report of an export.

    Attributes:
        path: The bundle.
        build_id: Build id of the bundle.
        graphs: One report per graph, with paths inside the bundle.
        bytes: Total size of all files.
        status: State of the model: its kind, the length of its training, whether its quality was measured.
        unchanged: Whether the bundle was there already and was left as it is.
    """

    path: Path
    build_id: str
    graphs: tuple[GraphReport, ...]
    bytes: int
    status: ModelStatus
    unchanged: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        graphs = [graph.to_dict() for graph in self.graphs]
        return {
            "path": str(self.path), "build_id": self.build_id, "bytes": self.bytes, "status": self.status.to_dict(),
            "graphs": graphs,
        }  # fmt: skip


def plan_samplers(
    model: ConsistencyModel,
    steps: Sequence[int],
    *,
    times: Sequence[float] = (),
    renoise: Renoise | None = None,
    start_time: float | None = None,
    max_batch: int = 32,
) -> tuple[SamplerSpec, ...]:
    """Return one spec per number of steps, or the one with the given times; and the one-step spec of a start time.

    ``renoise`` None is the model's rule.

    Raises:
        ConfigError: If a number of steps is out of range or not unique.
    """
    if not times and (len(set(steps)) != len(steps) or not steps):
        raise ConfigError(f"steps are {list(steps)}, expected different numbers, for example 1 and 2.")
    if start_time is not None and not 0 < start_time <= T_LIMIT:
        raise ConfigError(
            f"start_time is {start_time}, expected radians above 0 and at most pi/2, for example 1.1: a smaller time "
            "keeps more of the image."
        )
    if start_time is not None and 1 in ((len(times),) if times else steps):
        raise ConfigError(
            f"start_time {start_time} makes a sampler of one step, of which there is another, expected one sampler for "
            "each number of steps. Leave 1 out of steps: for example --steps 2."
        )
    wanted = [tuple(times)] if times else [None] * len(steps)
    counts = [len(times)] if times else list(steps)
    if start_time is not None:
        wanted, counts = [(start_time,), *wanted], [1, *counts]
    return tuple(
        model.spec(n, times=each, renoise=renoise, max_batch=max_batch) for n, each in zip(counts, wanted, strict=True)
    )


@checked_names("export_bundle")
def export_bundle(
    checkpoint: str | Path | ConsistencyModel,
    out: str | Path | Workspace,
    *,
    steps: Sequence[int] = (1, 2),
    times: Sequence[float] = (),
    renoise: Renoise | None = None,
    start_time: float | None = None,
    max_batch: int = 32,
    split: bool = False,
    name: str = "",
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    goldens: bool = True,
    further_sizes: Sequence[ImageSize] = (),
    add_parts: Callable[[Path], Mapping[str, Role]] = lambda folder: {},
    events: Events = SILENT,
) -> BundleReport:
    """Export a checkpoint to a bundle with one fp32 sampler graph per number of steps.

    If a stage fails, no files remain; an existing bundle at ``out`` stays until the new one is complete.

    Args:
        checkpoint: Folder with ``config.json`` and safetensors, for example a training run, or a pipeline that
            diffusers saved; or a model in evaluation mode.
        out: The bundle's folder, or a workspace of it.
        steps: Numbers of steps.
        times: Times of one sampler, radians, instead of ``steps``.
        renoise: Noise of the steps after the first, see ``SamplerSpec.renoise``; None is the model's rule.
        start_time: First time, radians, of a further sampler with one step, for ``gen(image=..., start_time=...)``.
        max_batch: Largest batch.
        split: Make the decoder a graph of its own, which ``Generator.from_pretrained(offload=True)`` loads in turn.
        name: Name of the model; default: the name of the folder.
        overwrite: Replace an existing bundle.
        provenance: Origin of the weights; default: that of the checkpoint.
        goldens: Whether to record samples of PyTorch, which other machines compare theirs with (``verify="smoke"``). A
            long clip takes hours of a CPU.
        further_sizes: More image sizes, height and width, pixels, each with a graph per sampler that shares the weights
            of the first size. They have no recorded samples.
        add_parts: Writes further files into the folder of the bundle, and returns the roles that no name determines.
        events: Receives the stages.

    Raises:
        ConfigError: If a custom network or decoder is not registered, there is no decoder to split off, or the model
            cannot have several sizes.
        BundleError: If ``out`` may not be replaced or cannot be written.
        ExportError: If the network cannot be exported.
    """
    from scm_sdk.model.consistency import ConsistencyModel
    from scm_sdk.model.networks.magnitude import bake_weights_

    given = isinstance(checkpoint, ConsistencyModel)
    model = checkpoint if isinstance(checkpoint, ConsistencyModel) else ConsistencyModel.from_pretrained(checkpoint)
    model.check_reopens()
    specs = plan_samplers(model, steps, times=times, renoise=renoise, start_time=start_time, max_batch=max_batch)
    _check_sizes(model, (image_size(specs), *further_sizes), split=split)
    others = [model.at_size(*size) for size in further_sizes]
    workspace, provenance = Workspace.of(out), provenance or dict(model.config.provenance)
    out = workspace.path
    name = name or out.name
    with publish_bundle(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder / DENOISER)
        if not given:
            bake_weights_(model.network)  # only this function references the model, so its memory can be reused
        frames = model.frame_decoder
        # Further sizes refer to a file of weights.
        write_graphs = partial(export_samplers, external_data_above=0) if others else export_samplers
        graphs = write_graphs(
            model, [spec.before_decoder if split or frames is not None else spec for spec in specs],
            folder / "onnx" / "fp32", decoder_path=folder / DECODER_PATH if split and frames is None else None,
            events=events,
        )  # fmt: skip
        sizes = []
        for other in others:
            events.stage(f"export the graphs of {describe_size(image_size([other.spec()]))} pixels")
            planned = plan_samplers(  # the times of a flow model depend on the size
                other, steps, times=times, renoise=renoise, start_time=start_time, max_batch=max_batch
            )
            size, made_here = _export_size(other, planned, folder, events)
            sizes.append(size)
            graphs += made_here
        if model.encoder is not None:
            events.stage("export the encoder")
            write_decoder(export_encoder(model.encoder), folder / ENCODER_PATH)
        further = dict(add_parts(folder))
        if frames is not None:
            events.stage("export the frame decoder")
            further |= export_frame_decoder(frames, folder)
        if goldens:
            events.stage("record reference samples")
            write_goldens(folder, {spec.num_inference_steps: draw_golden(model, spec) for spec in specs})
        if specs[0].renoise == "fresh":  # SCMScheduler knows no other
            atomic_write_bytes(folder / SCHEDULER_PATH, scheduler_json(specs[0]))
        relative = [graph.path.relative_to(folder).as_posix() for graph in graphs]
        artifacts = [
            Artifact(path=DENOISER, format="safetensors"),
            *(
                Artifact(path=path, format="onnx", num_inference_steps=spec.num_inference_steps)
                for path, spec in zip(relative, specs, strict=False)  # further sizes follow
            ),
        ]
        card = model_card(
            name, specs, provenance, artifacts=[*artifacts, *(a for size in sizes for a in size.artifacts)],
            sizes=(image_size(specs), *further_sizes),
        )  # fmt: skip
        atomic_write_bytes(folder / CARD_PATH, card.encode())
        events.stage("hash the files and write the manifest")
        parts = [
            path.relative_to(folder).as_posix() for path in sorted((folder / DENOISER).rglob("*")) if path.is_file()
        ]
        weights = [path for path in parts if path.endswith((".safetensors", CONFIG_NAME))]
        built = [*relative, ENCODER_PATH, DECODER_PATH, FIRST_FRAME_PATH, NEXT_FRAMES_PATH]
        made = [*built, *(f"{path}_data" for path in built), FRAMES_PATH, "golden/golden.safetensors"]
        manifest = write_bundle(
            folder,
            name=name,
            samplers=specs,
            artifacts=artifacts,
            roles={**dict.fromkeys((path for path in parts if not path.endswith(".safetensors")), "config"), **further},
            built_from={path: weights for path in made},
            provenance=provenance,
            versions=library_versions(),
            sizes=sizes,
            digests={
                **{path: graph.sha256 for path, graph in zip(relative, graphs, strict=True)},
                **{f"{path}_data": graph.data_sha256 for path, graph in zip(relative, graphs, strict=True)},
            },
        )
    workspace.adopt(Bundle.written(out, manifest, hashed=[entry.path for entry in manifest.files]))
    return report_bundle(workspace, graphs=[g.moved(out / path) for g, path in zip(graphs, relative, strict=True)])


def _check_sizes(model: ConsistencyModel, sizes: Sequence[ImageSize], *, split: bool) -> None:
    """Refuse several image sizes with the same one twice, or with parts that are made for one size.

    Raises:
        ConfigError: If they are refused.
    """
    if len(sizes) == 1:
        return
    known = ", ".join(map(describe_size, sizes))
    if len(set(sizes)) != len(sizes):
        raise ConfigError(f"the image sizes are {known}, height x width, expected each once.")
    parts = {
        "--split": split,
        "--encoder": model.encoder is not None,
        "--frame-decoder": model.frame_decoder is not None,
    }
    if found := [name for name, there in parts.items() if there]:
        raise ConfigError(
            f"{' and '.join(found)} is given with the image sizes {known}, expected one size: that part is a graph for "
            "one size alone. Leave it out, or make a bundle for each size."
        )


def _export_size(
    model: ConsistencyModel, specs: tuple[SamplerSpec, ...], folder: Path, events: Events
) -> tuple[Size, tuple[GraphReport, ...]]:
    """Write the graphs of a further image size next to those of the first, into the folder of a new bundle."""
    name = sized_name(image_size(specs))
    graphs = export_samplers(model, specs, folder / "onnx" / "fp32", name=name, beside=GRAPH_NAME, events=events)
    more = sum(graph.bytes + graph.data_bytes for graph in graphs)
    events.note(f"{name}: {more / 1e6:.1f} MB more; all other weights are stored once, for the first size")
    artifacts = tuple(
        Artifact(path=graph.path.relative_to(folder).as_posix(), format="onnx", num_inference_steps=steps)
        for graph, steps in zip(graphs, (spec.num_inference_steps for spec in specs), strict=True)
    )
    return Size(samplers=specs, artifacts=artifacts), graphs


def is_current(
    checkpoint: str | Path, out: str | Path | Workspace, *, steps: Sequence[int] = (), times: Sequence[float] = (),
    renoise: Renoise | None = None, start_time: float | None = None, max_batch: int | None = None,
    split: bool | None = None, further_sizes: Sequence[ImageSize] | None = None,
) -> bool:  # fmt: skip
    """Return whether the bundle in ``out`` was exported from these weights for these samplers.

    For an unchanged bundle, leftovers of killed commands are removed here, because nothing else is written.

    Args:
        checkpoint: Folder of a checkpoint or a pipeline.
        out: The bundle's folder; it may be missing; or a workspace of it.
        steps: Numbers of steps; () is any.
        times: Times of one sampler, radians, instead of ``steps``.
        renoise: Noise of the steps after the first; None is any.
        start_time: First time of a further sampler with one step, radians.
        max_batch: Largest batch; None is any.
        split: Whether the decoder is a graph of its own; None is any.
        further_sizes: Image sizes after the first, in order; None is any.
    """
    workspace = Workspace.of(out)
    if not (workspace.path / MANIFEST_NAME).is_file():
        return False
    remove_leftovers(workspace.path.resolve().parent, beside=workspace.path.name)
    try:
        manifest = workspace.bundle.manifest
    except ScmError:  # damaged: exporting again repairs it
        return False
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    kept = (path.removeprefix(f"{DENOISER}/") for path in digests if path.startswith(f"{DENOISER}/"))
    decisive = [
        name for name in kept if name.endswith((".safetensors", CONFIG_NAME))
    ]  # those of a pipeline are in folders
    same_weights = bool(decisive) and all(
        (Path(checkpoint) / name).is_file() and digests[f"{DENOISER}/{name}"] == sha256_file(Path(checkpoint) / name)
        for name in decisive
    )
    one = manifest.samplers[0]  # parts of the checkpoint's config, which is the same
    wanted = {tuple(times)} if times else {_with_steps(Path(checkpoint), one, n).times for n in steps}
    wanted |= set() if start_time is None else {(start_time,)}
    same_times = not wanted or wanted == {spec.times for spec in manifest.samplers}
    same_rest = all(
        max_batch in (None, spec.max_batch) and renoise in (None, spec.renoise) for spec in manifest.samplers
    )
    same_rest = same_rest and (further_sizes is None or tuple(further_sizes) == manifest.image_sizes[1:])
    return same_weights and same_times and same_rest and split in (None, manifest.is_split)


def kept_options(out: str | Path | Workspace) -> tuple[bool, tuple[ImageSize, ...]]:
    """Return what a new export is to keep of the bundle that is there, if any: ``split`` and ``further_sizes``."""
    workspace = Workspace.of(out)
    if not (workspace.path / MANIFEST_NAME).is_file():
        return False, ()
    try:
        manifest = read_manifest(workspace.path)
    except BundleError:  # damaged: nothing of it is kept
        return False, ()
    return manifest.is_split, manifest.image_sizes[1:]


def _with_steps(checkpoint: Path, spec: SamplerSpec, num_inference_steps: int) -> SamplerSpec:
    """Return the sampler of a checkpoint with another number of steps; a pipeline has times of its own."""
    from scm_sdk.model.foreign.pipelines import read_pipeline

    if is_pipeline(checkpoint):
        return read_pipeline(checkpoint).spec(num_inference_steps)
    return spec.with_steps(num_inference_steps)


def current_export(
    checkpoint: str | Path, out: str | Path, *, steps: Sequence[int] = (1, 2), times: Sequence[float] = (),
    renoise: Renoise | None = None, start_time: float | None = None, max_batch: int = 32, split: bool = False,
    name: str = "",
) -> BundleReport | None:  # fmt: skip
    """Return the report of the existing bundle if ``export_bundle`` would create the same; else None.

    Args are those of ``export_bundle``.
    """
    from scm_sdk.model.foreign.pipelines import read_pipeline

    workspace = Workspace(out)
    if renoise is None:
        renoise = read_pipeline(Path(checkpoint)).spec().renoise if is_pipeline(Path(checkpoint)) else "fresh"
    if not is_current(
        checkpoint, workspace, steps=steps, times=times, renoise=renoise, start_time=start_time, max_batch=max_batch,
        split=split, further_sizes=(),
    ):  # fmt: skip
        return None
    return report_bundle(workspace) if workspace.opened.manifest.name == (name or Path(out).name) else None


def report_bundle(path: str | Path | Workspace, graphs: Sequence[GraphReport] | None = None) -> BundleReport:
    """Return the report of a bundle.

    Args:
        path: The bundle, or the workspace that it is open in.
        graphs: Reports of its graphs; None reads its fp32 graphs.
    """
    bundle = path.opened if isinstance(path, Workspace) else Bundle.open(path, verify="none")
    if graphs is None:
        everything = (a for a in bundle.manifest.all_artifacts if (a.format, a.precision) == ("onnx", "fp32"))
        exported = sorted(everything, key=lambda a: a.num_inference_steps)
        graphs = [read_report(bundle.path / artifact.path) for artifact in exported]
    return BundleReport(
        path=bundle.path,
        build_id=bundle.manifest.build_id,
        graphs=tuple(graphs),
        bytes=sum(entry.size for entry in bundle.manifest.files),
        status=bundle.status,
    )


def draw_golden(model: ConsistencyModel, spec: SamplerSpec) -> Golden:
    """Sample a few images with the torch ``Sampler``, the reference of all backends."""
    import numpy as np
    import torch

    from scm_sdk.model.sampler import Sampler

    count = min(NUM_GOLDENS, spec.max_batch)
    seeds = np.arange(count, dtype=np.int64)
    labels = seeds % spec.num_classes if spec.num_classes else None
    request = make_example(spec, seeds.tolist(), class_labels=labels)
    noise, conditioning = request.inputs(0, count)
    inputs = [*noise, *(conditioning[tensor.name] for tensor in spec.conditioning_inputs)]
    with torch.inference_mode():
        images = Sampler(model, spec).eval()(*map(torch.from_numpy, inputs)).numpy()
    return Golden(images=images, seeds=seeds, class_labels=labels)


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that build a bundle."""
    found = {"scm-sdk": __version__, "python": platform.python_version()}
    versions = {library: distribution_version(library) for library in LIBRARIES}
    return found | {library: version for library, version in versions.items() if version is not None}
