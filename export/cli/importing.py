"""``import``: convert a few-step pipeline of diffusers to a bundle, or an EDM pickle to safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import TerminalEvents, json_option, print_json, say
from .libraries import EXPORT, require_all
from .located import local_folder, revision_option
from .names import STEPS, OutputPath, sampler_options, split_option

if TYPE_CHECKING:
    from scm_sdk.spec import Renoise

    from ..bundle_export import BundleReport


@click.command(name="import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=OutputPath(replaces=True), help="Folder to write.")
@click.option("--entry", default="ema", help="Name of the network in an EDM-style pickle.")
@click.option(
    "--license",
    default="",
    metavar="ID",
    help="License of the weights, an SPDX id; default: that of the source.",
)
@click.option(
    "--steps",
    multiple=True,
    type=STEPS,
    help="Number of network calls of a pipeline's graph; may be repeated. Default: the pipeline's usual ones.",
)
@sampler_options
@click.option("--size", "sizes", multiple=True, metavar="HxW",
              help="Image size of a pipeline, pixels; default: its own. Repeated: all in one bundle, the first one is "
              "the default.")  # fmt: skip
@click.option("--frames", type=click.IntRange(1), help="Frames of a pipeline's videos; default: its own number.")
@click.option("--tokens", type=click.IntRange(1), help="Length of a pipeline's prompts, tokens; default: its own.")
@click.option("--max-batch", type=click.IntRange(1), default=8, help="Largest batch of a pipeline's graphs, images.")
@click.option("--text-encoder/--no-text-encoder", default=True, help="Copy a pipeline's text encoder into the bundle.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="WanPipeline of diffusers whose autoencoder and configs go with an rCM .pt file.",
)
@click.option("--distilled", is_flag=True, help="The weights are a few-step student, where the folder does not say so.")
@click.option("--frame-decoder", is_flag=True,
              help="Decode clips frame by frame, by two graphs whose size does not grow with --frames.")  # fmt: skip
@click.option("--golden/--no-golden", "goldens", default=True,
              help="Record PyTorch samples of a flow pipeline; a long clip takes hours of a CPU.")  # fmt: skip
@click.option("--encoder", is_flag=True, help="Add the encoder of a pipeline's autoencoder, for generate --image.")
@split_option
@click.option("--onnx-text-encoder", is_flag=True,
              help="Also export a pipeline's text encoder as a graph: prompts then need no torch.")  # fmt: skip
@click.option("--vae", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Another autoencoder for a SANA-Sprint pipeline, such as DC-AE-Lite.")  # fmt: skip
@click.option("--lora", "loras", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="LoRA file to merge into a SANA-Sprint transformer; may be repeated.")  # fmt: skip
@click.option("--lora-scale", type=float, default=1.0, help="Factor of the LoRA files.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier import in OUT.")
@revision_option
@json_option
def import_(
    source: Path, out: Path, entry: str, license: str, steps: tuple[int, ...], times: tuple[float, ...],
    renoise: Renoise | None, start_time: float | None, sizes: tuple[str, ...], frames: int | None, tokens: int | None,
    max_batch: int, text_encoder: bool, base: Path | None, distilled: bool, frame_decoder: bool, goldens: bool,
    encoder: bool, split: bool,
    onnx_text_encoder: bool, vae: Path | None, loras: tuple[Path, ...], lora_scale: float, overwrite: bool,
    revision: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Import a few-step pipeline, an rCM file, or an EDM or EDM2 pickle.

    Pipelines: SANA-Sprint, FLUX.2-klein, Z-Image-Turbo, AnyFlow, and students of Wan 2.1 (rCM, DMD). A pipeline is
    converted to a bundle, a pickle to safetensors. SOURCE is a folder or hub id of a pipeline that diffusers saved, a
    .pt file of rCM, or a .pkl file; no code of a file is executed. An import that already exists in OUT with the same
    options is left unchanged.

    \b
    scm-export import Sana_Sprint_0.6B_1024px_diffusers -o sana --steps 2
    scm-export import Sana_Sprint_0.6B_1024px_diffusers -o sana --size 1024 --size 768x1344
    scm-export import hf:OWNER/NAME --revision COMMIT -o sana --steps 2
    scm-export import rCM_Wan2.1_T2V_1.3B_480p.pt --base Wan2.1-T2V-1.3B-Diffusers -o clips --frames 17
    scm-export import edm2-img64-s-1073741-0.075.pkl -o edm2-img64-s
    """
    student = source.suffix in (".pt", ".pth")
    if student != (base is not None):
        found = f"is given for {source}" if base else f"is missing for {source}"
        raise click.UsageError(f"--base {found}, expected --base FOLDER with a .pt file of rCM, and only there.")
    if student or (not source.is_file() and source.suffix != ".pkl"):
        require_all(*EXPORT)
        from scm_sdk.model.foreign.pipelines import is_sana

        from ..flow_pipeline import import_flow_pipeline
        from ..sana import import_sana, parse_size

        folder = source if student else local_folder(source, revision)
        origin = source.name if folder == source else f"{source}@{folder.name}"  # the commit that was fetched
        wanted = [parse_size(size) for size in sizes]
        given: dict[str, Any] = {"times": times, "size": wanted[0] if wanted else None, "further_sizes": wanted[1:]}
        given |= {"max_batch": max_batch}
        given |= {"split": split}
        given |= {"text_encoder": text_encoder, "onnx_text_encoder": onnx_text_encoder}
        create: Callable[..., BundleReport]
        if not student and is_sana(folder):
            only: dict[str, object] = {
                "--distilled": distilled, "--frames": frames is not None, "--frame-decoder": frame_decoder,
                "--no-golden": not goldens,
            }  # fmt: skip
            if option := next((name for name, value in only.items() if value), ""):
                raise click.UsageError(f"{option} is given for a SANA-Sprint pipeline, expected it left out.")
            given |= {"steps": steps or (1, 2, 4), "renoise": renoise or "fresh"}
            given |= {"max_sequence_length": tokens or 300, "encoder": encoder, "start_time": start_time}
            given |= {"vae": vae, "loras": loras, "lora_scale": lora_scale}
            create = import_sana
        else:
            only = {"--encoder": encoder, "--start-time": start_time is not None, "--vae": vae, "--lora": loras}
            if option := next((name for name, value in only.items() if value), ""):
                raise click.UsageError(f"{option} is given, expected it left out: it is for SANA-Sprint pipelines.")
            given |= {"steps": steps, "renoise": renoise, "num_frames": frames or 0, "distilled": distilled}
            given |= {"frame_decoder": frame_decoder, "goldens": goldens}
            given |= {"max_sequence_length": tokens or 0, "base": base}
            create = import_flow_pipeline
        with TerminalEvents() as events:
            report = create(
                folder, out, origin=origin, overwrite=overwrite, reuse=not overwrite, events=events, **given
            )
        if as_json:
            print_json({**report.to_dict(), "unchanged": report.unchanged})
        state = "unchanged, " if report.unchanged else ""
        say(f"{out}: {state}build {report.build_id[:12]}, {report.bytes / 1e6:.1f} MB. Next: scm-export validate {out}")
        return
    if revision is not None:
        raise click.UsageError(f"--revision is given with the file {source}, expected a hub id for it.")
    _import_pickle(source, out, entry=entry, license=license, overwrite=overwrite, as_json=as_json)


def _import_pickle(source: Path, out: Path, *, entry: str, license: str, overwrite: bool, as_json: bool) -> None:
    from scm_sdk.pickles.convert import convert_pickle, is_converted

    unchanged = not overwrite and is_converted(source, out, entry=entry, license=license)
    converted = convert_pickle(source, out, entry=entry, license=license, overwrite=overwrite or unchanged)
    network = converted.network
    if as_json:
        print_json({
            "path": str(out), "entry": network.entry, "class_name": network.class_name, "arguments": network.arguments,
            "tensors": len(network.tensors), "bytes": network.nbytes, "license": converted.license,
            "license_stated_at_import": converted.stated, "source_sha256": converted.source_sha256,
            "unchanged": unchanged,
        })  # fmt: skip
    say(f"{out}: {network.class_name}, {len(network.tensors)} tensors, {network.nbytes / 1e6:.1f} MB.")
    say(converted.license_line)
