"""The manifest of a bundle: one JSON file that lists its content.

Data only, without file access; ``scm_sdk.bundle.bundle`` reads, writes and enforces it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

import msgspec

from .._util.json_struct import to_json
from ..errors import ConfigError, SchemaError, printable
from ..spec import Precision, SamplerSpec
from .layout import DECODER_PATH, FRAMES_PATH

MANIFEST_NAME = "scm_manifest.json"
SIGNATURE_NAME = "scm_signature.json"
"""The signature of all other files, including the manifest, which therefore does not list it; see ``signing``."""
SCHEMA_VERSION = 2
"""Manifests of version 1 have no ``digests``; they are read, and rewritten in the current version."""

Role = Literal[
    "weights", "config", "graph", "graph-data", "engine", "edge", "golden", "report", "card", "plan", "calibration"
]
Format = Literal[
    "safetensors", "onnx", "tensorrt", "tensorrt_rtx", "litert", "executorch", "openvino_ir", "coreml", "mnn"
]
FOLDER_FORMATS: frozenset[Format] = frozenset({"safetensors", "coreml"})
"""Formats whose artifact is a folder."""
SUFFIXES: dict[Format, str] = {
    "onnx": ".onnx",
    "litert": ".tflite",
    "executorch": ".pte",
    "openvino_ir": ".xml",
    "coreml": ".mlpackage",
    "mnn": ".mnn",
}
"""How the name of an artifact ends. Libraries go by the name: another one is another format to them."""

PSNR_CAP = 999.0
"""Maximum PSNR, dB: JSON has no infinity, and different float32 images are far below."""

_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""Exceptions of msgspec and json for untrusted text: JSON or schema errors, no UTF-8, duplicate names, deep nesting."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the bundle.

    Attributes:
        path: Relative POSIX path inside the bundle.
        size: Bytes.
        sha256: Hex digest of the content.
        role: Purpose of the file.
        built_from: Paths of its sources.
    """

    path: str
    size: int
    sha256: str
    role: Role
    built_from: tuple[str, ...] = ()


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conditions of an engine: they must hold before its library loads it.

    Attributes:
        library_version: Version of the library that built it, all four numbers.
        compute_capabilities: Target GPUs, for example ``("8.0", "8.6")``.
        platform: Target ``<system>-<machine>``, for example ``linux-x86_64``.
        batch: Smallest, optimal and largest batch of its profile.
        hardware_compatibility: ``none``, ``same_compute_capability`` or ``ampere_plus``.
        version_compatible: Whether newer versions of the library may load it.
        gpu: Name of the GPU that built it; "" if built without a GPU.
    """

    library_version: str
    compute_capabilities: tuple[str, ...]
    platform: str
    batch: tuple[int, int, int]
    hardware_compatibility: Literal["none", "same_compute_capability", "ampere_plus"] = "none"
    version_compatible: bool = False
    gpu: str = ""


class Artifact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input of a backend: a PyTorch checkpoint, a graph or an engine.

    Attributes:
        path: The file that a backend opens; for ``FOLDER_FORMATS`` the folder.
        format: File format, which determines the backends.
        precision: Precision of the artifact.
        num_inference_steps: Its number of steps; 0 means any (a checkpoint is unrolled on demand).
        engine: Conditions of an engine; None for other formats.
        recipe: Options of its creation, JSON values; with ``built_from`` they determine whether it is current.
    """

    path: str
    format: Format
    precision: Precision = "fp32"
    num_inference_steps: int = 0
    engine: EngineFacts | None = None
    recipe: dict[str, Any] = {}


class ParityRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recorded comparison of an artifact with its reference; differences in units of ``sigma_data``.

    Attributes:
        artifact: Path of the candidate.
        reference: Path of the reference.
        backend: Backend of the candidate.
        gate: The deciding statistic: ``max_abs`` for fp32, ``psnr_p05_db`` for reduced precisions. Older records have
            ``psnr_db``: the mean over all samples reached the threshold, and each sample 12 dB less.
        threshold: Largest ``max_abs`` that passes, derived from ``noise_floor``; or the required PSNR, dB. The gate
            ``psnr_p05_db`` fails if all of ``psnr_p05_interval_db`` is below it.
        noise_floor: Largest difference of the reference from itself in other runs.
        max_abs: Largest absolute difference.
        psnr_db: Peak signal-to-noise ratio over all samples, dB; ``PSNR_CAP`` if the two are equal.
        num_samples: Samples compared, in each batch split.
        first_seed: Seed of the first sample.
        batches: Compared batch splits; () in older records.
        passed: Whether the gate was met.
        reason: Reason for a threshold that was set manually.
        psnr_p05_db: PSNR that 95 % of the samples reach, dB.
        psnr_p05_interval_db: Confidence interval of the 5th percentile of all samples, dB, each end with 95 %
            confidence; the lower end is 0 if ``num_samples`` is too small.
        worst_psnr_db: PSNR of the worst single sample, dB.
        psnr_by_step: PSNR of the estimate after each step, dB; () if not measured.
        fault: Structural fault of the artifact, independent of the statistics; "" if none was found.
        precision: Precision that the backend computed in; "" for that of the artifact.
        cpu_class: Class of the CPU, if the numbers depend on it: in bf16.
        num_inference_steps: Number of steps that was compared, of an artifact that runs any number; else 0.
    """

    artifact: str
    reference: str
    backend: str
    gate: Literal["max_abs", "psnr_p05_db", "psnr_db"] = "max_abs"
    threshold: float
    noise_floor: float
    max_abs: float
    psnr_db: float = 0.0
    num_samples: int
    passed: bool
    reason: str = ""
    worst_psnr_db: float = 0.0
    psnr_by_step: tuple[float, ...] = ()
    fault: str = ""
    psnr_p05_db: float = 0.0
    psnr_p05_interval_db: tuple[float, float] = (0.0, 0.0)
    first_seed: int = 0
    batches: tuple[int, ...] = ()
    precision: Precision | Literal[""] = ""
    cpu_class: str = ""
    num_inference_steps: int = 0

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """What was compared; a newer record of the same replaces this one."""
        return (
            self.artifact, self.reference, self.backend, self.precision, self.cpu_class, self.num_inference_steps
        )  # fmt: skip

    @property
    def way(self) -> str:
        """The backend, with the precision that it computed in and the class of CPU where these matter."""
        return describe_way(self.backend, self.precision, self.cpu_class)

    @property
    def verdict(self) -> str:
        """``passed``, ``FAILED``, or ``not taken``: a lower precision that a backend offers is no fault of a bundle."""
        return "passed" if self.passed else "not taken" if self.precision else "FAILED"

    @property
    def finding(self) -> str:
        """Result and limit as a short text."""
        if self.fault:
            return printable(self.fault)
        if self.gate == "psnr_p05_db":
            reached = f"95 % of {self.num_samples} samples reach {self.psnr_p05_db:.1f} dB"
            return f"{reached} of at least {self.threshold:.0f} dB"
        if self.gate == "psnr_db":
            return f"{self.psnr_db:.1f} dB of at least {self.threshold:.0f} dB"
        return f"{self.max_abs:.1e} of {self.threshold:.1e} allowed"


def describe_way(backend: str, precision: str = "", cpu_class: str = "") -> str:
    """Return how an artifact is run, in words: ``openvino in bf16 (avx512_bf16)``."""
    return backend + (f" in {precision}" if precision else "") + (f" ({printable(cpu_class)})" if cpu_class else "")


class Size(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A further image size of a bundle.

    Attributes:
        samplers: As ``Manifest.samplers``, for images of this size.
        artifacts: Its graphs; the checkpoint of the bundle runs any of its sizes.
    """

    samplers: tuple[SamplerSpec, ...]
    artifacts: tuple[Artifact, ...]

    @property
    def image(self) -> ImageSize:
        """Height and width, pixels."""
        return image_size(self.samplers)


ImageSize = tuple[int, int]
"""Height and width, pixels."""


def image_size(samplers: Sequence[SamplerSpec]) -> ImageSize:
    """Return height and width of the images of samplers, pixels; 1 for an axis that they lack."""
    height, width = (1, 1, *samplers[0].image_shape[1:])[-2:]
    return height, width


def describe_size(size: ImageSize) -> str:
    """Return a size in words: ``768x1344``, height first."""
    return f"{size[0]}x{size[1]}"


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Content of a bundle.

    Attributes:
        schema_version: Version of this schema; a newer one is refused.
        build_id: sha256 over everything that determines the artifacts: graph bytes, options, library versions.
        name: Human name of the model.
        samplers: One spec for each number of steps the bundle has graphs for.
        artifacts: Checkpoint, graphs and engines. With several image sizes, these and ``samplers`` are of the first.
        files: Every file except the manifest itself.
        parity: Recorded comparisons.
        budgets: Latency budgets that ``scm-export validate`` enforces, in the format of ``inference.latency``.
        provenance: Origin of weights and data, licenses, recipe; free form.
        versions: Versions of the libraries that built the bundle.
        cut_from: Build id of the full bundle, if this one is a subset; see ``subset``.
        digests: The sha256 of each part above, by name; see ``verify.seal``.
        sizes: Further image sizes.
    """

    schema_version: int = SCHEMA_VERSION
    build_id: str
    name: str
    samplers: tuple[SamplerSpec, ...]
    artifacts: tuple[Artifact, ...]
    files: tuple[FileEntry, ...]
    parity: tuple[ParityRecord, ...] = ()
    budgets: tuple[str, ...] = ()
    provenance: dict[str, Any] = {}
    versions: dict[str, str] = {}
    cut_from: str = ""
    digests: dict[str, str] = {}
    sizes: tuple[Size, ...] = ()

    @property
    def image_sizes(self) -> tuple[ImageSize, ...]:
        """Every image size, the first one first."""
        return image_size(self.samplers), *(size.image for size in self.sizes)

    @property
    def all_artifacts(self) -> tuple[Artifact, ...]:
        """The artifacts of every image size."""
        return *self.artifacts, *(artifact for size in self.sizes for artifact in size.artifacts)

    def at_size(self, height: int, width: int) -> Manifest:
        """Return the manifest with the samplers and artifacts of one image size.

        Of a further size it has no comparisons of the checkpoint, which are those of the first, and no budgets.

        Raises:
            ConfigError: If the bundle does not have this size.
        """
        if (height, width) == image_size(self.samplers):
            return self
        found = next((size for size in self.sizes if size.image == (height, width)), None)
        if found is None:
            known = ", ".join(map(describe_size, self.image_sizes))
            raise ConfigError(
                f"the image size is {describe_size((height, width))}, expected one of {known}, height x width, which "
                f"{self.name} was exported for. Choose one of them, or import the pipeline with --size for this one."
            )
        paths = {artifact.path for artifact in found.artifacts}
        checkpoints = (a for a in self.artifacts if a.format == "safetensors")
        return msgspec.structs.replace(
            self,
            samplers=found.samplers,
            artifacts=(*checkpoints, *found.artifacts),
            parity=tuple(record for record in self.parity if record.artifact in paths),
            budgets=(),
            sizes=(),
        )

    @property
    def is_split(self) -> bool:
        """Whether the decoder is a graph of its own, or two; then graphs and engines end in latents."""
        return self.has_decoder_graph or self.has_frame_decoder

    @property
    def has_decoder_graph(self) -> bool:
        """Whether the decoder is one graph, ``DECODER_PATH``."""
        return any(entry.path == DECODER_PATH for entry in self.files)

    @property
    def has_frame_decoder(self) -> bool:
        """Whether clips are decoded frame by frame, by the graphs next to ``FRAMES_PATH``."""
        return any(entry.path == FRAMES_PATH for entry in self.files)

    @property
    def cut_note(self) -> str:
        """A sentence, after a space, for errors about parts that a subset lacks; "" for a full bundle."""
        if not self.cut_from:
            return ""
        return (
            f" This bundle was cut from build {self.cut_from[:12]} and holds only some of its artifacts: use that "
            "bundle, which is whole."
        )

    def to_json(self) -> bytes:
        """Return indented JSON that ``from_json`` reads back to an equal manifest.

        Without further image sizes it is that of older versions, which do not know the field.
        """
        return to_json({name: part for name, part in msgspec.to_builtins(self).items() if part or name != "sizes"})

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Parse a manifest.

        Raises:
            SchemaError: If it is not JSON, has a duplicate key, a newer schema, or violates the schema.
        """
        try:
            version = msgspec.json.decode(data, type=_VersionOnly).schema_version
        except _UNREADABLE as exc:
            raise SchemaError(f"{MANIFEST_NAME} cannot be read: {exc}. Export the bundle again.") from exc
        if version < 1:
            raise SchemaError(
                f"{MANIFEST_NAME} has schema version {version}, expected 1 or more. Export the bundle again."
            )
        if version > SCHEMA_VERSION:
            raise SchemaError(
                f"{MANIFEST_NAME} has schema version {version}, this scm-sdk reads up to {SCHEMA_VERSION}. "
                "Install a newer version of scm-sdk."
            )
        try:
            json.loads(data, object_pairs_hook=_refuse_duplicates)
            return msgspec.json.decode(data, type=cls)
        except (*_UNREADABLE, ConfigError) as exc:  # ConfigError: a sampler is invalid
            raise SchemaError(
                f"{MANIFEST_NAME} breaks schema version {version}: {exc}. Export the bundle again."
            ) from exc


def files_of(manifest: Manifest, artifact: str) -> tuple[FileEntry, ...]:
    """Return the files of an artifact: all files of its folder.

    The external data of a graph and the build record of an engine are in the same folder.
    """
    folder = artifact.rpartition("/")[0] if any(e.path == artifact for e in manifest.files) else artifact
    # An artifact next to the manifest: its data file has its name as prefix.
    start = f"{folder}/" if folder else artifact
    return tuple(entry for entry in manifest.files if entry.path.startswith(start))


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    """Refuse an object with a duplicate key, because parsers differ in which value they return."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")


class _VersionOnly(msgspec.Struct):
    schema_version: int


_OF_NAME: dict[str, Role] = {
    "README.md": "card",
    "config.json": "config",
    "scheduler_config.json": "config",
    "build.json": "config",
    ".safetensors": "weights",
    ".onnx": "graph",
    ".onnx_data": "graph-data",
    ".engine": "engine",
}
_OF_FOLDER: dict[str, Role] = {
    "edge": "edge",
    "golden": "golden",
    "reports": "report",
    "precision": "plan",
    "calibration": "calibration",
}


def role_of(relative: str) -> Role:
    """Return the role of a file.

    Raises:
        ConfigError: If the name does not determine the role.
    """
    path = PurePosixPath(relative)
    role = _OF_FOLDER.get(path.parts[0]) if len(path.parts) > 1 else None
    role = role or _OF_NAME.get(path.name) or _OF_NAME.get(path.suffix)
    if role is None:
        raise ConfigError(
            f"the role of {relative} cannot be derived from its name, expected one of "
            f"{', '.join(get_args(Role))}. Give it in roles, or leave the file out."
        )
    return role
