"""Compare each pipeline that ``scm-export import`` knows with the library's own call, in every precision.

    python benchmarks/fidelity/pipelines.py --out benchmarks/results

Builds a tiny random folder of each pipeline, imports it, and generates from the same noise and embeddings as the
library: in PyTorch, ONNX Runtime and OpenVINO, and from the graphs of ``precision`` and ``quantize``. Then encodes
prompts by the text encoders, in PyTorch and as graphs. Nothing is downloaded; the tiny pipelines are the tests' (extra
``test``). Writes ``pipelines.json``, the table ``pipelines.md``, one picture of all ways and a clip of the videos.
Exits 1 if float32 misses its bound, or a way is refused for another reason than a CPU without the precision.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw

from scm_sdk import Generator
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk.errors import BackendUnavailable, ScmError
from scm_sdk.export.flow_pipeline import import_flow_pipeline
from scm_sdk.export.graph.text_encoder import export_text_encoder
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.int8_variants import QuantizeOptions, add_int8
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.export.sana import import_sana
from scm_sdk.images import save_clip
from scm_sdk.inference.parity.difference import find_blank
from scm_sdk.inference.prompt_graph import PromptGraph
from scm_sdk.model.foreign.few_step_folder import Settings, read_few_step_folder
from scm_sdk.model.foreign.flow_prompts import FlowPromptEncoder
from scm_sdk.model.foreign.prompt_encoder import PromptEncoder
from scm_sdk.spec import Precision

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
SANA: Any = import_module("helpers.sana_fixtures")
FLOW: Any = import_module("helpers.few_step_fixtures")

BOUNDS = {"torch": 1e-5, "onnxruntime": 1e-4, "openvino": 1e-4}
"""Largest difference of float32 that is allowed, of pictures in [0, 1]."""
WAYS: tuple[tuple[str, str, Precision], ...] = (
    ("PyTorch", "torch", "fp32"),
    ("ONNX Runtime", "onnxruntime", "fp32"),
    ("OpenVINO", "openvino", "fp32"),
    ("FP16", "onnxruntime", "fp16"),
    ("BF16, OpenVINO", "openvino", "bf16"),
    ("INT8", "onnxruntime", "int8"),
    ("INT8 for CPUs", "onnxruntime", "int8-cpu"),
    ("INT8 weights", "onnxruntime", "int8-weights"),
    ("INT4 weights", "onnxruntime", "int4"),
)
"""Every way by its name: backend and precision."""
START = 1.1
PROMPTS = ("a cat", "a  dog on\nthe moon &amp; a cat")
TOKENS = 40
"""Tokens of the prompts that text encoders are compared on."""
SCALE = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pipeline.

    Attributes:
        name: Class in diffusers.
        steps: Number of network calls.
        compared: What the samples are compared with.
        make: Imports the pipeline from the first folder into the second.
        wanted: Returns the library's samples, (N, H, W, 3) or (N, T, H, W, 3) in [0, 1].
        inputs: Returns the arguments of ``Generator.__call__`` for the same noise.
    """

    name: str
    steps: int
    compared: str
    make: Callable[[Path, Path], object]
    wanted: Callable[[], np.ndarray]
    inputs: Callable[[Any], Mapping[str, Any]]


@dataclass
class Result:
    """Samples and differences of one pipeline.

    Attributes:
        case: The pipeline.
        wanted: The library's samples.
        found: Samples of each way.
        notes: Why a way has none.
    """

    case: Case
    wanted: np.ndarray
    found: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def gap(self, way: str) -> float:
        """Return the largest difference of a way."""
        return float(np.abs(self.found[way] - self.wanted).max())

    def psnr(self, way: str) -> float:
        """Return the PSNR of a way, dB."""
        return -10 * math.log10(max(float(np.square(self.found[way] - self.wanted).mean()), 1e-20))

    def faults(self) -> list[str]:
        """Return what is wrong: float32 out of its bounds, blank samples, and ways that did not run."""
        found = [f"{self.case.name}, {way}: {note}" for way, note in self.notes.items() if note != NO_KERNELS]
        for way, backend, precision in WAYS:
            if way not in self.found:
                continue
            if precision == "fp32" and self.gap(way) > BOUNDS[backend]:
                found.append(f"{self.case.name}, {way}: {self.gap(way):.1e}, allowed {BOUNDS[backend]:.0e}")
            if blank := find_blank(self.found[way].astype(np.float32), self.wanted.astype(np.float32)):
                found.append(f"{self.case.name}, {way}: {blank}")
        return found


NO_KERNELS = "not computed by this CPU"


def sana_case(*, image: bool) -> Case:
    """Return SANA-Sprint, from noise or from an image."""
    steps = 1 if image else 2

    def make(source: Path, out: Path) -> None:
        SANA.make_sana().save_pretrained(source)
        import_sana(
            source, out, steps=(2,), start_time=START if image else None, size=(SANA.SIZE, SANA.SIZE), encoder=image,
            max_sequence_length=SANA.TOKENS, max_batch=2,
        )  # fmt: skip

    def inputs(gen: Generator) -> dict[str, Any]:
        embeds, mask, noise = SANA.make_sana_inputs()
        given = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "guidance_scale": 4.0, "noise": noise[:steps]}
        return given | ({"image": SANA.source_pictures(), "start_time": START} if image else {})

    def wanted() -> np.ndarray:
        made: np.ndarray = (
            SANA.pictures_from_pictures(SANA.source_pictures(), [START]) if image else SANA.pictures_of_sana(2, 4.0)
        )
        return made

    name = "SanaSprintImg2ImgPipeline" if image else "SanaSprintPipeline"
    return Case(name=name, steps=steps, compared="its own call", make=make, wanted=wanted, inputs=inputs)


def flow_case(name: str) -> Case:
    """Return a pipeline of the table of few-step flow models."""
    size, steps = FLOW.SIZES[name], FLOW.STEPS[name]
    feeds: dict[str, np.ndarray] = {}

    def make(source: Path, out: Path) -> None:
        FLOW.make_pipeline(name).save_pretrained(source)
        import_flow_pipeline(
            source, out, steps=(steps,), size=(size["height"], size["width"]), num_frames=size.get("num_frames", 0),
            max_sequence_length=FLOW.TOKENS, max_batch=2, distilled=True,
        )  # fmt: skip
        with Generator.from_pretrained(out, backend="torch", num_threads=1) as gen:
            feeds.update(FLOW.feeds_of(gen.opened().spec))

    def inputs(gen: Generator) -> dict[str, Any]:
        others = {key: value for key, value in feeds.items() if not key.startswith("noise_")}
        return {"noise": [value for key, value in feeds.items() if key.startswith("noise_")], **others}

    def wanted() -> np.ndarray:
        if name == "WanPipeline":
            noise = np.stack([value for key, value in feeds.items() if key.startswith("noise_")])
            frames: np.ndarray = np.moveaxis((FLOW.frames_by_rcm(noise, steps) / 2 + 0.5).clip(0, 1), 1, -1)
            return frames
        if name == "AnyFlowPipeline":
            return np.asarray(FLOW.frames_of_any_flow(feeds, steps))
        return np.moveaxis(FLOW.pictures_of(name, feeds, steps), 1, -1)

    compared = "rCM's sampler in float64" if name == "WanPipeline" else "its own call"
    return Case(name=name, steps=steps, compared=compared, make=make, wanted=wanted, inputs=inputs)


def all_cases() -> list[Case]:
    """Return every pipeline that can be imported."""
    return [sana_case(image=False), sana_case(image=True), *map(flow_case, FLOW.SIZES)]


def measure(case: Case, folder: Path) -> Result:
    """Import a pipeline, add every precision and generate in every way."""
    bundle = folder / "bundle"
    case.make(folder / "pipeline", bundle)
    result = Result(case, case.wanted())
    for way, backend, precision in WAYS:
        try:
            add(bundle, case.steps, precision)
            with Generator.from_pretrained(
                bundle, backend=backend, precision=precision, num_inference_steps=case.steps, num_threads=1
            ) as gen:
                images = gen(2, output_type="np", num_inference_steps=case.steps, **case.inputs(gen)).images
            result.found[way] = np.asarray(images, np.float64)
        except BackendUnavailable as exc:
            if precision != "bf16":
                raise click.ClickException(f"{way}: {exc}") from exc
            result.notes[way] = NO_KERNELS
        except ScmError as exc:
            result.notes[way] = f"{type(exc).__name__}: {exc}"
        click.echo(f"{case.name}, {way}: {describe(result, way)}", err=True)
    return result


def add(bundle: Path, steps: int, precision: Precision) -> None:
    """Add the graph of a precision; float32 and bf16, which a backend computes from float32, need none."""
    if precision == "fp16":
        add_precision(bundle, default_plan("fp16"), steps=[steps], num_samples=4)
    elif precision in ("int8", "int8-cpu", "int8-weights", "int4"):
        base: Any = "fp16" if precision == "int8" else "fp32"
        add_int8(bundle, QuantizeOptions(precision=precision, base=base, num_samples=8), steps=[steps])


def describe(result: Result, way: str) -> str:
    """Return a cell of the table."""
    if way not in result.found:
        return result.notes[way]
    exact = dict((name, precision) for name, _, precision in WAYS)[way] == "fp32"
    return f"{result.gap(way):.1e}" if exact else f"{result.psnr(way):.1f} dB"


def measure_text(name: str, folder: Path) -> dict[str, float]:
    """Return the largest difference of a text encoder's embeddings from the pipeline's, in PyTorch and as a graph."""
    pipeline = folder / "pipeline"
    encoder: PromptEncoder | FlowPromptEncoder
    tokens = TOKENS
    if name == "SanaSprintPipeline":
        tokens = SANA.TOKENS
        SANA.make_sana().save_pretrained(pipeline)
        encoder = PromptEncoder(pipeline)
        embeds, _ = SANA.encode_by_diffusers(list(PROMPTS), tokens)
    else:
        embeds, _ = FLOW.encode_by_diffusers(name, list(PROMPTS), tokens)
        settings = Settings(max_sequence_length=tokens, distilled=True, **FLOW.SIZES[name])
        encoder = FlowPromptEncoder(read_few_step_folder(FLOW.save_with_text(name, pipeline), settings))
    ours, _ = encoder.encode(PROMPTS, tokens)
    export_text_encoder(encoder, folder, max_sequence_length=tokens)
    by_graph, _ = PromptGraph(folder / "text_encoder" / "model.onnx").encode(PROMPTS, tokens)
    return {"torch": float(np.abs(ours - embeds).max()), "onnxruntime": float(np.abs(by_graph - embeds).max())}


def table(results: list[Result], texts: Mapping[str, Mapping[str, float]]) -> str:
    """Return the tables, Markdown."""
    lines = [
        "Tiny random pipelines, for the same noise and embeddings: the largest difference from the samples of",
        f"diffusers {version('diffusers')}, in [0, 1], for float32; the PSNR for lower precisions. Made by",
        "`python benchmarks/fidelity/pipelines.py`. Random networks magnify rounding in another way than trained ones:",
        "a PSNR here shows that a precision works on a pipeline, not how good it is on the released model.",
        "",
        f"| pipeline | steps | compared with | {' | '.join(way for way, *_ in WAYS)} |",
        f"|---|---|---|{'---|' * len(WAYS)}",
    ]
    for result in results:
        cells = " | ".join(describe(result, way) for way, *_ in WAYS)
        lines.append(f"| `{result.case.name}` | {result.case.steps} | {result.case.compared} | {cells} |")
    if texts:
        lines += [
            "",
            "Prompt embeddings of tiny random text encoders, largest difference from the pipeline's `encode_prompt`:",
            "",
            "| pipeline | PyTorch | graph, ONNX Runtime |",
            "|---|---|---|",
        ]
        lines += [f"| `{name}` | {gap['torch']:.1e} | {gap['onnxruntime']:.1e} |" for name, gap in texts.items()]
    return "\n".join(lines) + "\n"


def draw(results: list[Result], out: Path) -> None:
    """Write one picture: a row for each pipeline, a column for each way, first the library's own."""
    height = max(result.wanted.shape[-3] for result in results) * SCALE
    width = max(result.wanted.shape[-2] for result in results) * SCALE
    names = ["library", *(way for way, *_ in WAYS)]
    sheet = Image.new("RGB", (len(names) * (width + 6), len(results) * (height + 22) + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        pen.text((column * (width + 6) + 2, 2), name, fill="black")
    for row, result in enumerate(results):
        top = 16 + row * (height + 22)
        pen.text((2, top), result.case.name, fill="black")
        for column, name in enumerate(names):
            samples = result.wanted if name == "library" else result.found.get(name)
            if samples is None:
                continue
            picture = samples[0] if samples.ndim == 4 else samples[0, -1]
            shown = Image.fromarray(np.round(picture * 255).astype(np.uint8))
            size = (shown.width * SCALE, shown.height * SCALE)
            sheet.paste(shown.resize(size, Image.Resampling.NEAREST), (column * (width + 6), top + 14))
    sheet.save(out / "pipelines.png", optimize=True)


def draw_clip(results: list[Result], out: Path) -> None:
    """Write one clip, a row for each video pipeline: the library's, ONNX Runtime's, INT8's and INT4's."""
    names = [name for name in ("ONNX Runtime", "INT8", "INT4 weights") if all(name in r.found for r in results)]
    rows = [np.concatenate([r.wanted[0], *(r.found[name][0] for name in names)], axis=2) for r in results]
    clip = np.round(np.concatenate(rows, axis=1) * 255).astype(np.uint8)
    save_clip(clip.repeat(SCALE, axis=1).repeat(SCALE, axis=2), out / "pipelines.webp", fps=4.0)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the four files.")
@click.option("--only", multiple=True, help="Only pipelines of this class; may be repeated.")
@click.option("--text/--no-text", default=True, help="Also compare the text encoders.")
def main(out: Path, only: tuple[str, ...], text: bool) -> None:
    """Measure, print and write."""
    cases = [case for case in all_cases() if not only or case.name in only]
    if not cases:
        raise click.UsageError(f"--only is {', '.join(only)}, expected of {', '.join(c.name for c in all_cases())}.")
    results, texts = [], {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(case, Path(folder)))
        if text and case.name != "SanaSprintImg2ImgPipeline":
            with tempfile.TemporaryDirectory() as folder:
                texts[case.name] = measure_text(case.name, Path(folder))
    out.mkdir(parents=True, exist_ok=True)
    shown = table(results, texts)
    click.echo(shown)
    rows = [
        {
            "pipeline": result.case.name, "steps": result.case.steps, "compared_with": result.case.compared, "way": way,
            "backend": backend, "precision": precision, "note": result.notes.get(way, ""),
            "max_abs": result.gap(way) if way in result.found else None,
            "psnr_db": result.psnr(way) if way in result.found else None,
        }
        for result in results
        for way, backend, precision in WAYS
    ]  # fmt: skip
    libraries = {name: version(name) for name in ("diffusers", "onnxruntime", "openvino", "torch", "transformers")}
    record = {"libraries": libraries, "samples": rows, "prompt_embeddings": texts}
    atomic_write_bytes(out / "pipelines.json", (json.dumps(record, indent=1) + "\n").encode())
    atomic_write_bytes(out / "pipelines.md", shown.encode())
    draw(results, out)
    if clips := [result for result in results if result.wanted.ndim == 5]:
        draw_clip(clips, out)
    faults = [fault for result in results for fault in result.faults()]
    for name, gap in texts.items():
        faults += [f"{name}, prompt embeddings, {way}: {gap[way]:.1e}" for way in gap if gap[way] > BOUNDS[way]]
    for fault in faults:
        click.echo(fault, err=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
