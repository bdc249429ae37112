"""Import a SANA-Sprint pipeline of diffusers as a bundle: its weights, and one graph per number of steps.

Each graph holds the transformer once per step and the decoder of the autoencoder after the last; its inputs are the
noise, the guidance scale, and the embeddings and mask of a prompt. The text encoder is copied unchanged; the encoder of
the autoencoder becomes a graph of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.files import sha256_file
from scm_sdk.bundle.layout import ENCODER_PATH, PROMPT_GRAPH_PATH
from scm_sdk.bundle.manifest import Role
from scm_sdk.errors import ConfigError
from scm_sdk.spec import Renoise

from .bundle_export import DENOISER, BundleReport, export_bundle, is_current, report_bundle
from .graph.text_encoder import check_has_text_encoder, export_text_encoder
from .workspace import Workspace

MAX_BATCH = 8
"""Default of the largest batch, small because images have a megapixel."""


def import_sana(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    steps: Sequence[int] = (1, 2, 4),
    times: Sequence[float] = (),
    renoise: Renoise = "fresh",
    start_time: float | None = None,
    size: tuple[int, int] | None = None,
    further_sizes: Sequence[tuple[int, int]] = (),
    max_sequence_length: int = 300,
    max_batch: int = MAX_BATCH,
    text_encoder: bool = True,
    onnx_text_encoder: bool = False,
    encoder: bool = False,
    split: bool = False,
    vae: str | os.PathLike[str] | None = None,
    loras: Sequence[str | os.PathLike[str]] = (),
    lora_scale: float = 1.0,
    name: str = "",
    origin: str = "",
    overwrite: bool = False,
    reuse: bool = False,
    events: Events = SILENT,
) -> BundleReport:
    """Import a ``SanaSprintPipeline`` that diffusers saved.

    Args:
        source: Folder of the pipeline.
        out: The bundle's folder; if a stage fails, no files remain.
        steps: Numbers of steps, one graph each.
        times: Times of one sampler, radians, instead of ``steps``.
        renoise: Noise of the steps after the first; see ``SamplerSpec.renoise``.
        start_time: First time, radians, of a further sampler with one step, for ``gen(image=..., start_time=...)``.
        size: Height and width of the images, pixels; None is the model's own size.
        further_sizes: More sizes, which share the weights; see ``export_bundle``.
        max_sequence_length: Tokens of a prompt.
        max_batch: Largest batch.
        text_encoder: Whether to copy the text encoder. A bundle without it takes embeddings only.
        onnx_text_encoder: Whether to export the text encoder as a graph, float32, which encodes prompts without torch.
        encoder: Whether to export the encoder of the autoencoder, which ``gen(image=...)`` needs.
        split: Make the decoder a graph of its own, for ``Generator.from_pretrained(offload=True)``.
        vae: Folder of another ``AutoencoderDC``, such as DC-AE-Lite; None is that of the pipeline.
        loras: LoRA files of the transformer, merged in order.
        lora_scale: Factor of all of them.
        name: Name of the model; default: the name of the folder.
        origin: Origin of the folder, stored in the bundle; default: its name.
        overwrite: Replace an existing bundle.
        reuse: Leave an existing bundle as it is if it came from the same weights with the same options.
        events: Receives the stages.

    Raises:
        BackendUnavailable: If diffusers is not installed.
        ConfigError: If the folder is another pipeline, a config has unknown settings, or a LoRA file does not fit.
        BundleError: If a component is missing, or ``out`` cannot be written.
        ExportError: If the network cannot be exported.
    """
    from scm_sdk.model.foreign.sana import load_sana
    from scm_sdk.model.foreign.sana_folder import OBJECTIVE, Settings, read_sana_folder
    from scm_sdk.model.foreign.sana_parts import with_parts

    height, width = size or (0, 0)
    settings = Settings(height=height, width=width, max_sequence_length=max_sequence_length)
    provenance = {
        "source": origin or Path(source).name,
        "pipeline": "SanaSprintPipeline",
        "objective": OBJECTIVE,
        "license": "see the source's card",
    }
    if vae is not None:
        provenance["vae"] = Path(vae).name
    if loras:
        provenance["lora"] = ", ".join(f"{Path(file).name} (sha256 {sha256_file(file)[:12]})" for file in loras)
        provenance["lora_scale"] = f"{lora_scale:g}"
    workspace = Workspace(out)

    def is_same() -> bool:
        if not is_current(
            folder, workspace, steps=steps, times=times, renoise=renoise, start_time=start_time, max_batch=max_batch,
            split=split, further_sizes=further_sizes,
        ):  # fmt: skip
            return False
        there, given = read_sana_folder(Path(out) / DENOISER), read_sana_folder(folder)
        same = there.settings == settings and there.has_text_encoder == (text_encoder and given.has_text_encoder)
        same = same and encoder == (Path(out) / ENCODER_PATH).is_file()
        return same and onnx_text_encoder == (Path(out) / PROMPT_GRAPH_PATH).is_file()

    with with_parts(
        Path(source), vae=None if vae is None else Path(vae), loras=list(map(Path, loras)), lora_scale=lora_scale
    ) as folder:
        if reuse and is_same():
            return replace(report_bundle(workspace), unchanged=True)
        model = load_sana(folder, settings, encoder=encoder)
        if onnx_text_encoder:
            check_has_text_encoder(model.folder)
        model.keep_text_encoder = text_encoder

        def add_parts(bundle: Path) -> dict[str, Role]:
            if not onnx_text_encoder:
                return {}
            from scm_sdk.model.foreign.prompt_encoder import PromptEncoder

            events.stage("export the text encoder")
            return export_text_encoder(PromptEncoder(folder), bundle, max_sequence_length=max_sequence_length)

        return export_bundle(
            model,
            Path(out),
            steps=steps,
            times=times,
            renoise=renoise,
            start_time=start_time,
            max_batch=max_batch,
            split=split,
            name=name,
            overwrite=overwrite,
            provenance=provenance,
            further_sizes=further_sizes,
            add_parts=add_parts,
            events=events,
        )


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``1024`` or ``768x1344``, height first.

    Raises:
        ConfigError: If it is neither.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"size is {text!r}, expected pixels such as 1024, or HEIGHTxWIDTH such as 768x1344.")
    return int(parts[0]), int(parts[-1])
