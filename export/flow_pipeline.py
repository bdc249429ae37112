"""Import a few-step flow pipeline of diffusers as a bundle: its weights, and one graph per number of steps.

Each graph holds the transformer once per step and the autoencoder's decoder after the last; its inputs are the noise
and the embeddings of a prompt. ``scm_sdk.model.foreign.few_step_folder`` has the table of pipelines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scm_sdk._util.events import SILENT, Events
from scm_sdk.bundle.goldens import GOLDEN_PATH
from scm_sdk.bundle.layout import PROMPT_GRAPH_PATH
from scm_sdk.bundle.manifest import Role
from scm_sdk.errors import BundleError
from scm_sdk.spec import Renoise

from .bundle_export import DENOISER, BundleReport, export_bundle, is_current, report_bundle
from .graph.text_encoder import check_has_text_encoder, export_text_encoder
from .sana import MAX_BATCH
from .workspace import Workspace

if TYPE_CHECKING:
    from scm_sdk.model.foreign.few_step_folder import Settings


def import_flow_pipeline(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    steps: Sequence[int] = (),
    times: Sequence[float] = (),
    renoise: Renoise | None = None,
    size: tuple[int, int] | None = None,
    further_sizes: Sequence[tuple[int, int]] = (),
    num_frames: int = 0,
    max_sequence_length: int = 0,
    max_batch: int = MAX_BATCH,
    distilled: bool = False,
    base: str | os.PathLike[str] | None = None,
    text_encoder: bool = True,
    onnx_text_encoder: bool = False,
    split: bool = False,
    frame_decoder: bool = False,
    goldens: bool = True,
    name: str = "",
    origin: str = "",
    overwrite: bool = False,
    reuse: bool = False,
    events: Events = SILENT,
) -> BundleReport:
    """Import a few-step flow pipeline that diffusers saved.

    Args:
        source: Folder of the pipeline; its class is in the table of docs/models.md. Or an rCM student of Wan 2.1, a
            ``.pt`` file, which is read without executing it.
        out: The bundle's folder; if a stage fails, no files remain.
        steps: Numbers of steps, one graph each; () is the pipeline's usual ones.
        times: Times of one sampler, radians, instead of ``steps``.
        renoise: Noise of the steps after the first; None is the pipeline's rule. See ``SamplerSpec.renoise``.
        size: Height and width, pixels; None is the pipeline's default.
        further_sizes: More sizes, which share the weights; see ``export_bundle``.
        num_frames: Frames of a video, 4 n + 1; 0 is the pipeline's default.
        max_sequence_length: Tokens of a prompt; 0 is the pipeline's default.
        max_batch: Largest batch.
        distilled: The weights are a few-step student; needed where the folder does not say so.
        base: The ``WanPipeline`` folder with autoencoder and configs of a ``.pt`` file; None for a folder.
        text_encoder: Whether to copy a text encoder that prompts can be encoded with; the base's, for a ``.pt`` file. A
            bundle without it takes embeddings only.
        onnx_text_encoder: Whether to export the text encoder as a graph, float32, which encodes prompts without torch.
        split: Make the decoder a graph of its own, for ``Generator.from_pretrained(offload=True)``.
        frame_decoder: Decode clips frame by frame, with two graphs whose size does not grow with the clip; the others
            end in latents.
        goldens: Whether to record samples of PyTorch; see ``export_bundle``.
        name: Name of the model; default: the name of the folder.
        origin: Origin of the folder, stored in the bundle; default: its name.
        overwrite: Replace an existing bundle.
        reuse: Leave an existing bundle as it is if it came from the same weights with the same options.
        events: Receives the stages.

    Raises:
        BackendUnavailable: If diffusers is not installed.
        ConfigError: If the folder is another pipeline, the full model of many steps, or has unknown settings.
        BundleError: If a component is missing, or ``out`` cannot be written.
        ExportError: If the network cannot be exported.
    """
    from scm_sdk.model.foreign.few_step import load_few_step
    from scm_sdk.model.foreign.few_step_folder import read_few_step_folder

    settings = _settings(size, num_frames, max_sequence_length, distilled or base is not None, frame_decoder)
    workspace = Workspace(out)

    def is_same() -> bool:
        given = read_few_step_folder(folder, settings)
        rule = renoise or given.row.renoise
        parts = split or frame_decoder
        if not is_current(
            folder, workspace, times=times, renoise=rule, max_batch=max_batch, split=parts, further_sizes=further_sizes
        ):
            return False
        found = {spec.times for spec in workspace.opened.manifest.samplers}
        wanted = {tuple(times)} if times else {given.spec(n).times for n in steps or given.row.steps}
        there = read_few_step_folder(Path(out) / DENOISER)
        same = found == wanted and there.settings == given.settings
        same = same and there.has_text_encoder == (text_encoder and given.has_text_encoder)
        same = same and goldens == (Path(out) / GOLDEN_PATH).is_file()
        return same and onnx_text_encoder == (Path(out) / PROMPT_GRAPH_PATH).is_file()

    with _pipeline(source, out, base) as folder:
        if reuse and is_same():
            return replace(report_bundle(workspace), unchanged=True)
        model = load_few_step(folder, settings)
        model.keep_text_encoder = text_encoder
        if onnx_text_encoder:
            check_has_text_encoder(model.folder)

        def add_parts(bundle: Path) -> dict[str, Role]:
            if not onnx_text_encoder:
                return {}
            from scm_sdk.model.foreign.flow_prompts import FlowPromptEncoder

            events.stage("export the text encoder")
            tokens = model.folder.settings.max_sequence_length
            return export_text_encoder(FlowPromptEncoder(model.folder), bundle, max_sequence_length=tokens)

        provenance = {
            "source": origin or Path(source).name,
            "pipeline": model.folder.row.name,
            "objective": "rCM" if base is not None else model.folder.row.objective,
            "license": "see the source's card",
        }
        return export_bundle(
            model,
            Path(out),
            steps=steps or model.folder.row.steps,
            times=times,
            renoise=renoise,
            max_batch=max_batch,
            split=split,
            name=name,
            overwrite=overwrite,
            provenance=provenance,
            goldens=goldens,
            further_sizes=further_sizes,
            add_parts=add_parts,
            events=events,
        )


@contextmanager
def _pipeline(
    source: str | os.PathLike[str], out: str | os.PathLike[str], base: str | os.PathLike[str] | None
) -> Iterator[Path]:
    """Provide the folder of the pipeline: the source, or one that is made of a student's file and then removed."""
    from scm_sdk.model.foreign.rcm_file import student_pipeline

    if base is None:
        yield Path(source)
        return
    beside = Path(out).absolute().parent  # the same disk, which must hold the bundle as well
    try:
        beside.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise BundleError(f"{beside} cannot be created: {exc.strerror or exc}. Choose another place.") from exc
    with student_pipeline(Path(source), Path(base), beside) as folder:
        yield folder


def _settings(
    size: tuple[int, int] | None, num_frames: int, tokens: int, distilled: bool, frame_decoder: bool
) -> Settings:
    from scm_sdk.model.foreign.few_step_folder import Settings

    height, width = size or (0, 0)
    return Settings(
        height=height, width=width, num_frames=num_frames, max_sequence_length=tokens, distilled=distilled,
        frame_decoder=frame_decoder,
    )  # fmt: skip
