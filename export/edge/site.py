"""A static site that runs a bundle in the visitor's browser, and its manifest.

The graphs are those of the bundle, byte for byte; the page, ``scm.js`` and the worker are in ``web/``; ONNX Runtime is
that of ``onnxruntime_web``. ``scm_site.json`` lists every file with its sha256, which ``scm.js`` compares before use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from scm_sdk._util.files import read_regular, safe_join, sha256_bytes
from scm_sdk._util.lazy import install_command, installed_version, is_installed
from scm_sdk._util.publish import atomic_folder
from scm_sdk._version import __version__
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.goldens import Golden
from scm_sdk.bundle.layout import ENCODER_PATH
from scm_sdk.bundle.manifest import Artifact, FileEntry, files_of
from scm_sdk.errors import BundleError, ConfigError, ParityError, SchemaError
from scm_sdk.inference.conditioning import read_prompts
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.parity.compare import FLOOR_FACTOR, MIN_PSNR_DB, ROUNDING_FLOOR
from scm_sdk.inference.parity.difference import percentile_interval
from scm_sdk.inference.parity.reference import noise_floor
from scm_sdk.inference.prompts import EMBEDS
from scm_sdk.inference.request import make_example
from scm_sdk.inference.start import can_start, has_encoder
from scm_sdk.spec import Precision, SamplerSpec

from ..bundle_export import NUM_GOLDENS
from ..graph.io import read_model
from ..precision.probe import bundle_examples
from .onnxruntime_web import PACKAGE, RUNTIME_FILES, VERSION, Device, packed, runtime_files
from .portability import find_faults, require_portable

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # since Python 3.11

SITE_NAME, INDEX_NAME = "scm_site.json", "index.html"
SCHEMA_VERSION = 1
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
"""Those that onnxruntime-web runs on every device that has them."""
CSP = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; "
    "style-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'"
)
"""The page's policy; the page repeats it in a meta element, where a server sends no headers."""
HEADERS = {
    "Content-Security-Policy": f"{CSP}; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""What a server should send with every file. COOP and COEP make SharedArrayBuffer available, which threads need."""
_MANIFEST_BYTES = 8 << 20
_ADDRESSABLE = 4 << 30
"""Bytes that a WebAssembly program has; the graphs of WebGPU are read through one, too."""


class SiteFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a site.

    Attributes:
        path: Relative POSIX path.
        size: Bytes of the content.
        sha256: Hex digest of the content.
        gzip_size: Bytes of ``path + ".gz"``, which holds the content; 0 where the file itself does.
    """

    path: str
    size: int
    sha256: str
    gzip_size: int = 0


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """What decides whether samples equal the recorded ones.

    Attributes:
        gate: ``max_abs``, or ``psnr_p05_db`` for a reduced precision; see ``ParityRecord``.
        threshold: Units of sigma_data; or dB.
        rank: Index of the sample, by rising PSNR, that must reach the threshold: the upper end of the interval of the
            5th percentile.
        source: Where the threshold is from.
    """

    gate: Literal["max_abs", "psnr_p05_db"]
    threshold: float
    rank: int
    source: str


class SiteGraph(msgspec.Struct, frozen=True, kw_only=True):
    """One graph of a site.

    Attributes:
        path: Its file.
        files: Its file and those of its weights.
        num_inference_steps: Number of network calls.
        precision: Its precision.
        devices: Devices that can run it.
        bound: How far its samples may be from the recorded ones.
    """

    path: str
    files: tuple[str, ...]
    num_inference_steps: int
    precision: Precision
    devices: tuple[Device, ...]
    bound: Bound


class SiteGoldens(msgspec.Struct, frozen=True, kw_only=True):
    """Recorded samples of one sampler.

    Attributes:
        num_inference_steps: Which sampler.
        path: File of the samples, float32, little-endian, (N, *image_shape), data units.
        seeds: Their seeds; as text, since JSON readers lose digits of large numbers.
        class_labels: Their labels, or None.
        guidance_scale: Their guidance scale, or None.
        conditioning: File of each input of its own that the model has, little-endian.
        made_by: What computed them.
    """

    num_inference_steps: int
    path: str
    seeds: tuple[str, ...]
    class_labels: tuple[int, ...] | None
    guidance_scale: float | None
    conditioning: dict[str, str]
    made_by: str


class SiteEncoder(msgspec.Struct, frozen=True, kw_only=True):
    """The graph that turns the pixels of an image to latents, for models of latents that start from images.

    Attributes:
        path: Its file.
        files: Its file and those of its weights.
        devices: Devices that can run it.
    """

    path: str
    files: tuple[str, ...]
    devices: tuple[Device, ...]


class SitePrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt that a visitor can choose: browsers have no text encoder.

    Attributes:
        text: The prompt.
        conditioning: File of each input that it fills, one sample, little-endian.
    """

    text: str
    conditioning: dict[str, str]


class DeviceFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of the runtime's files for one device; see ``RuntimeFiles``."""

    module: str
    glue: str
    binary: str


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """The library that runs the graphs.

    Attributes:
        name: Of its npm package.
        version: Of the package.
        license: SPDX name.
        devices: Its files for each device.
    """

    name: str
    version: str
    license: str
    devices: dict[Device, DeviceFiles]


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of a site; ``web/scm/types.d.ts`` declares it for ``scm.js``.

    Attributes:
        schema_version: Version of this schema.
        name: Human name of the model.
        build_id: Build id of the bundle.
        noise_contract: How a seed becomes noise.
        made_by: Name and version of this package.
        license: License of the model; "" if it is not on record.
        notes: What forbids to take the model for a finished product.
        samplers: One for each number of steps.
        graphs: What can be run.
        goldens: Recorded samples.
        prompts: Prompts that were encoded when the site was made.
        start_steps: Numbers of steps of the samplers that can start from an image, at their own first time.
        encoder: What they need for it, of a model of latents.
        runtime: What runs it.
        files: Every file but this one.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    build_id: str
    noise_contract: str
    made_by: str
    license: str
    notes: tuple[str, ...]
    samplers: tuple[SamplerSpec, ...]
    graphs: tuple[SiteGraph, ...]
    goldens: tuple[SiteGoldens, ...]
    prompts: tuple[SitePrompt, ...]
    start_steps: tuple[int, ...]
    encoder: SiteEncoder | None
    runtime: Runtime
    files: tuple[SiteFile, ...]


@dataclass(frozen=True, kw_only=True)
class Download:
    """What a visitor fetches who runs one graph on one device.

    Attributes:
        device: The device.
        precision: Precision of the graph.
        num_inference_steps: Its number of network calls.
        bytes: Page, runtime and graph, as they are sent.
    """

    device: Device
    precision: Precision
    num_inference_steps: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """What was written.

    Attributes:
        path: The folder.
        bytes: Of all its files.
        manifest_sha256: Of ``scm_site.json``; ``Generator.load`` can require it.
        downloads: One for each device and graph.
        notes: What the caller should know: a precision that is not there, a bound that was not recorded.
    """

    path: Path
    bytes: int
    manifest_sha256: str
    downloads: tuple[Download, ...]
    notes: tuple[str, ...]


def write_site(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    devices: Sequence[Device] = ("wasm", "webgpu"),
    precisions: Sequence[Precision] | None = None,
    steps: Sequence[int] | None = None,
    prompts: str | os.PathLike[str] | None = None,
    onnxruntime_web: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> SiteReport:
    """Write a site, whole or not at all.

    Args:
        bundle: A bundle with ONNX graphs of a model that makes pictures.
        out: The folder to write.
        devices: What a visitor can run it on.
        precisions: Precisions of the graphs; None takes fp32 and fp16, as far as the bundle has them.
        steps: Numbers of steps; None takes all.
        prompts: Text file with one prompt per line, for text-to-image models: a visitor chooses among them.
        onnxruntime_web: Folder or ``.tgz`` file of the npm package; None takes the cache or fetches it with npm.
        overwrite: Replace the site that is there.

    Raises:
        ConfigError: If the bundle lacks what is asked for, or the page cannot show what the model makes.
        ParityError: If the bundle records that a graph failed its comparison.
        UnsupportedGraphError: If no device that is asked for computes a graph right.
        BackendUnavailable: If onnxruntime-web must be fetched and cannot, or prompts cannot be encoded here.
        BundleError: If the bundle is damaged, or ``out`` may not be replaced or cannot be written.
    """
    opened = Bundle.open(bundle)
    opened.check_not_split("a site")
    chosen = _choose(opened, precisions, steps)
    for artifact in chosen:
        _check_showable(opened.spec(artifact.num_inference_steps))
        _check_size(opened, artifact)
    notes: list[str] = []
    goldens = _goldens(opened, sorted({a.num_inference_steps for a in chosen}), notes)
    encoded = _encode(opened, Path(prompts)) if prompts is not None else []
    if prompts is None and any(tensor.name == EMBEDS for tensor in opened.spec(chosen[0].num_inference_steps).inputs):
        notes.append("the model takes prompts, which browsers cannot encode. Give some: --prompts FILE")
    if precisions is None and {a.precision for a in chosen} != set(PRECISIONS):
        missing = next(name for name in PRECISIONS if name not in {a.precision for a in chosen})
        remedy = "scm-export onnx" if missing == "fp32" else f"scm-export precision {opened.path} --precision fp16"
        notes.append(f"the bundle has no {missing} graph, so neither has the site. Add it: {remedy}")
    runtime = runtime_files(devices, None if onnxruntime_web is None else Path(onnxruntime_web))
    with atomic_folder(out, overwrite=overwrite, marker=SITE_NAME) as folder:
        writer = _Writer(folder)
        for name, data in _assets(files(__package__) / "web"):  # pyright: ignore[reportArgumentType]
            writer.write(name, data)
        writer.write("_headers", _headers_file())
        for name, data in runtime.items():
            writer.write(f"runtime/{name}", data, gzipped=name.endswith(".wasm"))
        graphs = tuple(_copy_graph(opened, writer, artifact, devices, goldens, notes) for artifact in chosen)
        counts = sorted({graph.num_inference_steps for graph in graphs})
        starts = _start_steps(opened, counts, notes)
        manifest = opened.manifest
        site = Site(
            name=manifest.name,
            build_id=manifest.build_id,
            noise_contract=opened.spec(counts[0]).noise_contract,
            made_by=f"scm-sdk {__version__}",
            license=str(manifest.provenance.get("license") or ""),
            notes=opened.status.training_warnings,
            samplers=tuple(opened.spec(count) for count in counts),
            graphs=graphs,
            goldens=tuple(
                _write_golden(writer, opened.spec(count), *goldens[count]) for count in counts if count in goldens
            ),
            prompts=tuple(_write_prompt(writer, i, text, inputs) for i, (text, inputs) in enumerate(encoded)),
            start_steps=starts,
            encoder=_copy_encoder(opened, writer, devices, notes) if starts and has_encoder(opened) else None,
            runtime=Runtime(
                name=PACKAGE,
                version=VERSION,
                license="MIT",
                devices={
                    device: DeviceFiles(**{key: f"runtime/{name}" for key, name in vars(RUNTIME_FILES[device]).items()})
                    for device in devices
                },
            ),
            files=tuple(sorted(writer.files, key=lambda entry: entry.path)),
        )
        data = msgspec.json.format(msgspec.json.encode(site), indent=1) + b"\n"
        (folder / SITE_NAME).write_bytes(data)
    stored = sum(entry.gzip_size or entry.size for entry in site.files)
    return SiteReport(
        path=Path(out),
        bytes=stored + len(data),
        manifest_sha256=sha256_bytes(data),
        downloads=_downloads(site, len(data)),
        notes=tuple(dict.fromkeys(notes)),
    )


def read_site(folder: Path) -> Site:
    """Read the manifest of a site.

    Raises:
        BundleError: If there is none, or one of its paths leads out of the folder.
        SchemaError: If it is malformed.
    """
    remedy = f"Make the site again: scm-export web BUNDLE -o {folder}"
    try:
        site = msgspec.json.decode(read_regular(folder / SITE_NAME, most=_MANIFEST_BYTES), type=Site)
    except OSError as exc:
        raise BundleError(f"{folder} is no site: {SITE_NAME}: {exc.strerror or exc}. {remedy}") from exc
    except (msgspec.MsgspecError, ValueError, RecursionError, ConfigError) as exc:
        raise SchemaError(f"{folder / SITE_NAME} cannot be read: {exc}. {remedy}") from exc
    for entry in site.files:
        safe_join(folder, entry.path)
    return site


class _Writer:
    """Writes files of a site and lists them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: list[SiteFile] = []

    def write(self, path: str, data: bytes, *, gzipped: bool = False) -> None:
        stored = packed(data) if gzipped else data
        target = self._folder / (f"{path}.gz" if gzipped else path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(stored)
        self.files.append(
            SiteFile(path=path, size=len(data), sha256=sha256_bytes(data), gzip_size=len(stored) if gzipped else 0)
        )


def _choose(bundle: Bundle, precisions: Sequence[Precision] | None, steps: Sequence[int] | None) -> list[Artifact]:
    """Return the graphs that the site gets; all that was asked for by name must be there."""
    known = [a for a in bundle.artifacts(format="onnx") if a.precision in PRECISIONS]
    there = ", ".join(f"{a.precision} {a.num_inference_steps}-step" for a in known) or "none"
    cut = bundle.manifest.cut_note
    for precision in precisions or ():
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}, expected {' or '.join(PRECISIONS)}, which browsers run.")
    chosen = [
        a
        for a in known
        if (precisions is None or a.precision in precisions) and (steps is None or a.num_inference_steps in steps)
    ]
    wanted = {(p, s) for p in precisions or {a.precision for a in chosen} for s in steps or {0}}
    have = {(a.precision, a.num_inference_steps if steps else 0) for a in chosen}
    if not chosen or wanted - have:
        asked = " and ".join(
            [", ".join(precisions or PRECISIONS), *([f"{', '.join(map(str, steps))} steps"] if steps else [])]
        )
        raise ConfigError(
            f"{bundle.path} has these graphs for browsers: {there}; expected {asked}. Make them: scm-export onnx, then "
            f"scm-export precision.{cut}"
        )
    return chosen


def _check_showable(spec: SamplerSpec) -> None:
    shape = spec.image_shape
    if spec.output != "pixels" or len(shape) != 3 or shape[0] not in (1, 3):
        remedy = "Export a pipeline with its decoder" if spec.output != "pixels" else "Serve it: scm-export serve"
        raise ConfigError(
            f"the model returns {spec.output} of shape {shape}, expected pictures (C, H, W) with C = 1 or 3, which a "
            f"page can show. {remedy}, or run the graph in your own page."
        )


def _check_size(bundle: Bundle, artifact: Artifact) -> None:
    size = sum(entry.size for entry in files_of(bundle.manifest, artifact.path))
    if size >= _ADDRESSABLE:
        raise ConfigError(
            f"{artifact.path} of {bundle.path} has {size / 2**30:.1f} GiB, expected less than "
            f"{_ADDRESSABLE >> 30} GiB, which a browser's program can hold. Leave it out with --precision or --steps, "
            "or serve the model: scm-export serve."
        )


def _goldens(bundle: Bundle, counts: Sequence[int], notes: list[str]) -> dict[int, tuple[Golden, str]]:
    """Return recorded samples for some numbers of steps and what made them.

    An imported pipeline has none in its bundle: ONNX Runtime makes them here, with the bundle's fp32 graph.
    """
    found = {count: (golden, "PyTorch at export") for count, golden in bundle.goldens().items() if count in counts}
    for count in counts:
        if count in found or not bundle.artifacts(format="onnx", precision="fp32", num_inference_steps=count):
            continue
        if not is_installed("onnxruntime"):
            notes.append(f"nothing to prove with {count} steps: the bundle has no recorded samples, and onnxruntime, "
                         f"which makes them, is not installed ({install_command('onnxruntime')})")  # fmt: skip
            continue
        spec = bundle.spec(count)
        seeds = np.arange(min(NUM_GOLDENS, spec.max_batch), dtype=np.int64)
        labels = seeds % spec.num_classes if spec.num_classes else None
        request = make_example(spec, seeds.tolist(), class_labels=labels)
        with Generator.from_pretrained(
            bundle.path, backend="onnxruntime", precision="fp32", num_inference_steps=count, verify="none"
        ) as gen:
            images = gen.opened(count).backend.sample(*request.inputs(0, len(seeds)))
        maker = f"ONNX Runtime {installed_version('onnxruntime')} in fp32 when the site was made"
        found[count] = Golden(images=images, seeds=seeds, class_labels=labels), maker
    return found


def _encode(bundle: Bundle, prompts: Path) -> list[tuple[str, dict[str, np.ndarray[Any, Any]]]]:
    """Return each prompt of a text file with the inputs that it fills, (1, *shape)."""
    if prompts.suffix == ".safetensors":
        raise ConfigError(f"{prompts} holds tensors, expected a text file: a visitor chooses among its lines.")
    examples = bundle_examples(bundle.path, prompts)
    return [(text, examples.rows([i])) for i, text in enumerate(read_prompts(prompts))]


def _write_prompt(writer: _Writer, index: int, text: str, inputs: dict[str, np.ndarray[Any, Any]]) -> SitePrompt:
    paths = {}
    for name, array in inputs.items():
        paths[name] = f"prompts/{index}.{name}.bin"
        writer.write(paths[name], _little(array))
    return SitePrompt(text=text, conditioning=paths)


def _copy_graph(
    bundle: Bundle,
    writer: _Writer,
    artifact: Artifact,
    devices: Sequence[Device],
    goldens: dict[int, tuple[Golden, str]],
    notes: list[str],
) -> SiteGraph:
    """Copy the files of a graph, checked against the bundle's manifest."""
    devices = _able_devices(bundle, artifact.path, devices, notes)
    copied = [f"model/{_copy(bundle, writer, entry)}" for entry in files_of(bundle.manifest, artifact.path)]
    golden = goldens.get(artifact.num_inference_steps)
    return SiteGraph(
        path=f"model/{artifact.path}",
        files=tuple(copied),
        num_inference_steps=artifact.num_inference_steps,
        precision=artifact.precision,
        devices=tuple(devices),
        bound=_bound(bundle, artifact, 1 if golden is None else len(golden[0].seeds), notes),
    )


def _start_steps(bundle: Bundle, counts: Sequence[int], notes: list[str]) -> tuple[int, ...]:
    """Return the numbers of steps of the samplers that can start from an image in a browser."""
    with_encoder = [count for count in counts if can_start(bundle.spec(count), has_encoder=True)]
    if not with_encoder or not bundle.spec(counts[0]).output_shape:
        return tuple(with_encoder)
    if not has_encoder(bundle):
        notes.append("the page takes no image to start from: the bundle has no encoder. Import it again with --encoder")
        return ()
    size = sum(entry.size for entry in files_of(bundle.manifest, ENCODER_PATH))
    if size >= _ADDRESSABLE:
        notes.append(
            f"the page takes no image to start from: {ENCODER_PATH} has {size / 2**30:.1f} GiB, expected less than "
            f"{_ADDRESSABLE >> 30} GiB, which a browser's program can hold"
        )
        return ()
    return tuple(with_encoder)


def _copy_encoder(bundle: Bundle, writer: _Writer, devices: Sequence[Device], notes: list[str]) -> SiteEncoder:
    """Copy the files of the encoder, checked against the bundle's manifest."""
    able = _able_devices(bundle, ENCODER_PATH, devices, notes)
    copied = [f"model/{_copy(bundle, writer, entry)}" for entry in files_of(bundle.manifest, ENCODER_PATH)]
    return SiteEncoder(path=f"model/{ENCODER_PATH}", files=tuple(copied), devices=tuple(able))


def _able_devices(bundle: Bundle, graph: str, devices: Sequence[Device], notes: list[str]) -> Sequence[Device]:
    """Return the devices that compute a graph right, as far as is known; all known faults are of WebGPU."""
    model = read_model(bundle.file(graph))
    if "wasm" not in devices:
        require_portable(model, "onnxruntime-web")
    found = find_faults(model, runtime="onnxruntime-web") if "webgpu" in devices else []
    if not found:
        return devices
    rule = found[0].rule
    notes.append(f"{graph} runs on wasm alone: {rule.runtime} {rule.version} {rule.fault}. Expected {rule.remedy}")
    return [device for device in devices if device != "webgpu"]


def _copy(bundle: Bundle, writer: _Writer, entry: FileEntry) -> str:
    bundle.check_file(entry.path)
    data = read_regular(bundle.file(entry.path), most=entry.size)
    if sha256_bytes(data) != entry.sha256:
        raise BundleError(f"{entry.path} of {bundle.path} was replaced while it was copied. Run the command again.")
    writer.write(f"model/{entry.path}", data)
    return entry.path


def _bound(bundle: Bundle, artifact: Artifact, num_samples: int, notes: list[str]) -> Bound:
    """Return the strictest bound that ``validate`` recorded for a graph, or the default of its precision."""
    records = [record for record in bundle.manifest.parity if record.artifact == artifact.path]
    for record in records:
        if not record.passed:
            raise ParityError(
                f"{artifact.path} of {bundle.path} failed its comparison with {record.reference} on {record.backend}: "
                f"{record.finding}. Do not ship it; export it again, or leave its precision out."
            )
    rank = int(percentile_interval(range(num_samples))[2])
    least = MIN_PSNR_DB.get(artifact.precision)
    gate: Literal["max_abs", "psnr_p05_db"] = "max_abs" if least is None else "psnr_p05_db"
    recorded = [record for record in records if record.gate == gate]
    if recorded:
        best = min(recorded, key=lambda record: record.threshold if least is None else -record.threshold)
        source = f"recorded by scm-export validate, {best.backend}, {best.num_samples} samples"
        return Bound(gate=gate, threshold=best.threshold, rank=rank, source=source)
    notes.append(
        "the bundle records no comparison of some graphs: the page judges fp32 by a noise floor that was measured now, "
        f"and fp16 by the gate of its precision. Record one: scm-export validate {bundle.path}"
    )
    if least is not None:
        return Bound(gate=gate, threshold=least, rank=rank, source=f"the gate of {artifact.precision}")
    steps = artifact.num_inference_steps
    by = "onnxruntime" if is_installed("onnxruntime") else "torch"
    with Generator.from_pretrained(
        bundle.path, backend=by, precision="fp32", num_inference_steps=steps, verify="none"
    ) as gen:
        floor = noise_floor(gen, num_inference_steps=steps)
    source = f"{FLOOR_FACTOR:g} noise floors, measured at export by {by}"
    return Bound(gate=gate, threshold=max(ROUNDING_FLOOR, FLOOR_FACTOR * floor), rank=rank, source=source)


def _write_golden(writer: _Writer, spec: SamplerSpec, golden: Golden, made_by: str) -> SiteGoldens:
    """Write recorded samples with the inputs that they were made from, as ``bundle_export`` made them."""
    steps, count = spec.num_inference_steps, len(golden.seeds)
    path = f"goldens/{steps}step.f32"
    writer.write(path, golden.images.astype("<f4").tobytes())
    example = make_example(spec, golden.seeds.tolist(), class_labels=golden.class_labels)
    inputs = example.inputs(0, count)[1]
    own = {}
    for tensor in spec.conditioning:
        own[tensor.name] = f"goldens/{steps}step.{tensor.name}.bin"
        writer.write(own[tensor.name], _little(inputs[tensor.name]))
    scale = inputs.get("guidance_scale")
    return SiteGoldens(
        num_inference_steps=steps,
        path=path,
        seeds=tuple(map(str, golden.seeds.tolist())),
        class_labels=None if golden.class_labels is None else tuple(golden.class_labels.tolist()),
        guidance_scale=None if scale is None else float(scale[0]),
        conditioning=own,
        made_by=made_by,
    )


def _little(array: np.ndarray[Any, Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _downloads(site: Site, manifest_bytes: int) -> tuple[Download, ...]:
    sizes = {entry.path: entry.gzip_size or entry.size for entry in site.files}
    page = manifest_bytes + sum(
        size for path, size in sizes.items() if path.endswith((".html", ".css", ".js")) and "/runtime/" not in path
    )
    found = []
    for device, names in site.runtime.devices.items():
        runtime = sum(sizes[path] for path in (names.module, names.glue, names.binary))
        for graph in site.graphs:
            if device in graph.devices:
                found.append(
                    Download(
                        device=device,
                        precision=graph.precision,
                        num_inference_steps=graph.num_inference_steps,
                        bytes=page + runtime + sum(sizes[path] for path in graph.files),
                    )
                )
    return tuple(found)


def _headers_file() -> bytes:
    """Return ``HEADERS`` in the form that several hosts of static sites read."""
    return "\n".join(["/*", *(f"  {name}: {value}" for name, value in HEADERS.items()), ""]).encode()


def _assets(folder: Traversable, below: str = "") -> list[tuple[str, bytes]]:
    """Return path and content of each file of this package's ``web`` folder."""
    found: list[tuple[str, bytes]] = []
    for each in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if each.is_dir():
            found += _assets(each, f"{below}{each.name}/")
        else:
            found.append((f"{below}{each.name}", each.read_bytes()))
    return found
