"""Sources of a ``Generator``: a bundle, a checkpoint folder, or a pipeline of diffusers, as one class ``Source``."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from .._util.files import map_files, sha256_bytes, sha256_file
from .._util.locks import FolderLock
from ..bundle.bundle import Bundle, Verify
from ..bundle.layout import (
    CONFIG_NAME,
    DECODER_FOLDER,
    DECODER_PATH,
    ENCODER_PATH,
    FRAMES_PATH,
    INDEX_NAME,
    PROMPT_GRAPH_PATH,
    WEIGHTS_NAME,
)
from ..bundle.manifest import MANIFEST_NAME, Artifact, ImageSize, ParityRecord, describe_size, image_size
from ..bundle.resolve import find_and_hold
from ..bundle.scores import SCORES_PATH
from ..bundle.signing import Signer, check_signature
from ..bundle.status import ModelStatus
from ..bundle.verify import Stamp, is_settled, stamp
from ..errors import BundleError, ConfigError, IntegrityError
from ..spec import SamplerSpec, TensorSpec
from .backends import Graph, open_graph
from .frames import ClipDecoder, FrameSettings
from .prompts import Prompts

CHECKPOINT_STEPS = (1, 2)
"""What a checkpoint folder offers by itself; asked for by number it runs any steps."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model on disk. The files of a bundle are checked when they are opened: ``check_unchanged``.

    Attributes:
        path: The folder.
        build_id: Build id of the bundle; for a checkpoint the sha256 of the weights, "" if not computed.
        artifacts: The artifacts.
        parity: Recorded comparisons.
        steps: The exported numbers of steps, in the order of the source.
        bundle: The bundle, or None for a checkpoint folder.
        provenance: Origin of the weights.
        status: State of the model.
        text_encoder: Folder with the text encoder, if there is one.
        verify: How opened files are checked; see ``Bundle.check_unchanged``.
    """

    path: Path
    build_id: str
    artifacts: tuple[Artifact, ...]
    parity: tuple[ParityRecord, ...]
    steps: tuple[int, ...]
    bundle: Bundle | None
    provenance: Mapping[str, Any]
    status: ModelStatus
    _spec: Callable[[int], SamplerSpec]
    text_encoder: Path | None = None
    verify: Verify = "digest"
    _weights: tuple[Path, ...] = ()
    _hashed: tuple[Stamp, ...] = ()
    """Stamps of the weights of a checkpoint when they were hashed; () if a later change may not change them."""
    _lease: FolderLock | None = None
    """Lock that keeps an unpacked bundle in the cache."""
    _whole: Source | None = None
    """The source with all image sizes, of one that is at a further size."""

    @property
    def cut_note(self) -> str:
        """See ``Manifest.cut_note``."""
        return self.bundle.manifest.cut_note if self.bundle else ""

    def release(self) -> None:
        """Allow an unpacked bundle to be removed from the cache."""
        if self._lease is not None:
            self._lease.release()

    def at_size(self, size: ImageSize) -> Source:
        """Return the source at one of its image sizes.

        Args:
            size: Height and width, pixels.

        Raises:
            ConfigError: If it does not have this size.
        """
        if self.bundle is None:
            found = image_size([self.spec(self.default_steps, unrolled=False)])
            if size != found:
                raise ConfigError(
                    f"the image size is {describe_size(size)}, expected {describe_size(found)}, height x width: "
                    f"{self.path} is no bundle, which may have several. Import it with --size for each."
                )
            return self
        whole = self._whole or self
        assert whole.bundle is not None, "a source at one size is of a bundle"
        bundle = whole.bundle.at_size(*size)
        if bundle is whole.bundle:
            return whole
        manifest = bundle.manifest
        return replace(
            whole,
            artifacts=manifest.artifacts,
            parity=manifest.parity,
            steps=tuple(spec.num_inference_steps for spec in manifest.samplers),
            bundle=bundle,
            _spec=bundle.spec,
            _whole=whole,
        )

    @property
    def timed_as(self) -> str:
        """Build id for latencies, which the sizes of a bundle do not share."""
        if self._whole is None:
            return self.build_id
        return f"{self.build_id}@{describe_size(image_size([self.spec(self.default_steps, unrolled=False)]))}"

    @property
    def default_steps(self) -> int:
        """2 if available, otherwise the first number of the source."""
        return 2 if 2 in self.steps else self.steps[0]

    def spec(self, num_inference_steps: int, *, unrolled: bool) -> SamplerSpec:
        """Return the sampler with this number of steps.

        Args:
            num_inference_steps: Number of network calls.
            unrolled: Whether the caller unrolls a checkpoint, which runs any number of steps.

        Raises:
            ConfigError: If the source does not have this number of steps.
        """
        if num_inference_steps not in self.steps and not unrolled:
            raise ConfigError(
                f"num_inference_steps is {num_inference_steps}, expected one of "
                f"{', '.join(map(str, self.steps))}, which {self.path} was made for. "
                f"Choose one of them, or backend='torch', which unrolls any number.{self.cut_note}"
            )
        return self._spec(num_inference_steps)

    def locate(self, artifact: str) -> Path:
        """Return the path of an artifact."""
        return self.bundle.file(artifact) if self.bundle else self.path / artifact

    def check_unchanged(self, artifact: str) -> tuple[Stamp, ...]:
        """Compare the files of an artifact on disk with the opened source; see ``Bundle.check_unchanged``.

        Raises:
            IntegrityError: If the model was replaced or edited since it was opened.
        """
        if self.bundle is not None:
            return self.bundle.check_unchanged(artifact, verify=self.verify)
        stamps = self.stamps(artifact)
        if self.build_id and stamps != self._hashed and _digest(self._weights) != self.build_id:
            raise IntegrityError(
                f"the checkpoint at {self.path} was changed since it was opened; open it again. Its weights are not "
                f"those of sha256 {self.build_id[:12]}.., which were expected."
            )
        return stamps

    @contextmanager
    def check_while_loading(self, artifact: str) -> Iterator[None]:
        """Compare the files of an artifact, for a block that loads them; see ``Bundle.check_while_loading``.

        Raises:
            IntegrityError: As ``check_unchanged``, before or at the end of the block.
        """
        if self.bundle is not None:
            with self.bundle.check_while_loading(artifact, verify=self.verify):
                yield
        else:
            self.check_unchanged(artifact)
            yield

    def check_text_encoder(self) -> None:
        """Compare the text encoder with the opened source; see ``Bundle.check_text_encoder``.

        Raises:
            IntegrityError: If a file is missing, damaged or changed.
        """
        if self.bundle is not None and self.text_encoder is not None:
            self.bundle.check_text_encoder(self.text_encoder.relative_to(self.path).as_posix(), verify=self.verify)

    @property
    def prompt_graph(self) -> Path | None:
        """The graph of the text encoder, if the bundle has one."""
        bundle = self.bundle
        listed = bundle is not None and any(e.path == PROMPT_GRAPH_PATH for e in bundle.manifest.files)
        return bundle.file(PROMPT_GRAPH_PATH) if bundle is not None and listed else None

    @property
    def is_split(self) -> bool:
        """Whether the decoder is one separate graph, or the two of a frame decoder."""
        return self.bundle is not None and self.bundle.manifest.is_split

    def ends_in_latents(self, artifact: str) -> bool:
        """Return whether an artifact needs the graph of the decoder: each graph and engine of a split bundle."""
        return self.is_split and any(a.path == artifact and a.format != "safetensors" for a in self.artifacts)

    def open_decoder(self, spec: SamplerSpec, *, backend: str, device: str | None, num_threads: int | None) -> Graph:
        """Open the graph of the decoder, or the two of a frame decoder, and check the files against the opened source.

        Args:
            spec: A sampler of the source.
            backend: As in ``open_graph``.
            device: As in ``open_graph``.
            num_threads: As in ``open_graph``.

        Raises:
            BackendUnavailable: If the library or the device is not here.
            IntegrityError: If a file is missing, damaged or changed.
            BundleError: If the graph holds something that is not allowed.
        """
        assert self.bundle is not None, "only a bundle is split"
        open_part = partial(self._open_graph, backend=backend, device=device, num_threads=num_threads)
        if not self.bundle.manifest.has_frame_decoder:
            latents = TensorSpec(name="latents", shape=spec.sample_shape)
            images = TensorSpec(name="images", shape=spec.image_shape)
            return open_part(DECODER_PATH, [latents], [images])
        self.bundle.check_file(FRAMES_PATH, verify=self.verify)
        settings = FrameSettings.read(self.bundle.file(FRAMES_PATH))
        settings.check(spec)
        return ClipDecoder(settings, open_part)

    def _open_graph(
        self, path: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *,
        backend: str, device: str | None, num_threads: int | None,
    ) -> Graph:  # fmt: skip
        """Open a listed graph that is no sampler, and check its files against the opened source.

        Raises:
            IntegrityError: If it is not listed. Otherwise as ``open_decoder``.
        """
        assert self.bundle is not None, "only a bundle lists graphs"
        if not any(entry.path == path for entry in self.bundle.manifest.files):
            raise IntegrityError(f"{self.path} has no {path}, expected it next to the other graphs. Copy it whole.")
        file, graph = self.bundle.file(path), None
        try:
            with self.check_while_loading(path):
                self.bundle.check_graph(path)
                graph = open_graph(file, inputs, outputs, backend=backend, device=device, num_threads=num_threads)
        except BundleError:
            if graph is not None:  # weights that were hashed while they were loaded
                graph.close()
            raise
        return graph

    @property
    def num_parts(self) -> int:
        """Parts that ``offload`` loads in turn: the sampler, and text encoder, encoder and decoder where they are."""
        listed = set() if self.bundle is None else {entry.path for entry in self.bundle.manifest.files}
        has_text_encoder = self.text_encoder is not None or self.prompt_graph is not None
        return 1 + has_text_encoder + sum(path in listed for path in (ENCODER_PATH, DECODER_PATH, FRAMES_PATH))

    def check_prompt_graph(self) -> None:
        """Compare the graph of the text encoder and its tokenizer with the opened source, and check the graph.

        Raises:
            IntegrityError: If a file is missing, damaged or changed.
            BundleError: If the graph holds something that is not allowed.
        """
        if self.bundle is not None:
            self.check_unchanged(PROMPT_GRAPH_PATH)
            self.bundle.check_graph(PROMPT_GRAPH_PATH)

    def prompts(self, *, device: str | None = None, turn: threading.Lock | None = None) -> Prompts:
        """Return the prompt encoder: the graph of the text encoder, or the text encoder in PyTorch.

        Args:
            device: Device of the text encoder; None is the CPU.
            turn: See ``Part``.
        """
        graph = self.prompt_graph
        check = self.check_text_encoder if graph is None else self.check_prompt_graph
        return Prompts(self.text_encoder, device, note=self.cut_note, graph=graph, check=check, turn=turn)

    def check_graph(self, artifact: str) -> None:
        """Check an artifact that is a graph before a library reads it; see ``Bundle.check_graph``."""
        if self.bundle is not None and any(a.path == artifact and a.format == "onnx" for a in self.artifacts):
            self.bundle.check_graph(artifact)

    def stamps(self, artifact: str) -> tuple[Stamp, ...]:
        """Return the stamp of each file of an artifact; a changed stamp means that the file was written."""
        if self.bundle is not None:
            return self.bundle.stamps(artifact)
        return tuple(stamp(path) for path in self._weights)

    def check_same_model(self, again: Source) -> None:
        """Check that a reopened model is the same as this one; a bundle may have further artifacts.

        Raises:
            IntegrityError: If it is another model.
        """
        if self.bundle is None or again.bundle is None:
            same = self.build_id in ("", again.build_id)
        else:
            same = self.bundle.build_files <= again.bundle.build_files
        if not same:
            raise IntegrityError(
                f"the bundle at {self.path} was changed since it was opened; open it again. It holds another model, of "
                f"build id {again.build_id[:12]}.., expected {self.build_id[:12]}.."
            )

    def sha256(self, artifact: str) -> str:
        """Return the recorded sha256 of an artifact's main file: the graph, the engine or the weights."""
        if self.bundle is None:
            return self.build_id
        names = (artifact, f"{artifact}/{WEIGHTS_NAME}")
        return next((entry.sha256 for entry in self.bundle.manifest.files if entry.path in names), "")


def open_source(
    path: str | os.PathLike[str] | Bundle,
    *,
    verify: Verify = "digest",
    revision: str | None = None,
    local_files_only: bool = False,
    require_signature: Signer | None = None,
) -> Source:
    """Open a bundle or a checkpoint folder.

    The manifest of a bundle is checked at once, and each file before it is opened; files that are never opened may be
    missing.

    Args:
        path: The folder, a ``.scmz`` file, ``hf:owner/name`` on the hub, or an open bundle, of which only what changed
            is read again.
        verify: ``digest`` compares the sha256 of opened files, ``none`` their size; ``remembered`` as ``digest``, but
            takes the sha256 of a bundle's file that this user hashed before and that did not change since.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Read only the cache of the hub.
        require_signature: The required signer; None for no check.

    Raises:
        BundleError: If the folder does not exist, is not a model, or a file is damaged.
        IntegrityError: If a required signature is missing, wrong, or does not match the files.
    """

    def check(folder: Path) -> None:
        if require_signature is not None:
            check_signature(folder, require_signature)

    if isinstance(path, Bundle):
        check(path.path)
        return _from_bundle(path.refreshed(verify="none"), verify, None)
    folder, lease = find_and_hold(path, revision=revision, local_files_only=local_files_only, check=check)
    if (folder / MANIFEST_NAME).exists():
        return _from_bundle(Bundle.open(folder, verify="none"), verify, lease)
    if (folder / CONFIG_NAME).exists():
        return _from_checkpoint(folder, verify)
    if (folder / INDEX_NAME).exists():
        return _from_pipeline(folder, verify)
    raise BundleError(
        f"{folder} holds neither {MANIFEST_NAME} (a bundle) nor {CONFIG_NAME} (a checkpoint). "
        "Point at the folder that scm-export or save_pretrained wrote."
    )


def _from_bundle(bundle: Bundle, verify: Verify, lease: FolderLock | None) -> Source:
    manifest = bundle.manifest
    if os.path.lexists(bundle.path / SCORES_PATH):
        bundle.check_file(SCORES_PATH, verify=verify)  # which the status is read from
    return Source(
        path=bundle.path,
        build_id=manifest.build_id,
        artifacts=manifest.artifacts,
        parity=manifest.parity,
        steps=tuple(spec.num_inference_steps for spec in manifest.samplers),
        bundle=bundle,
        provenance=manifest.provenance,
        status=bundle.status,
        _spec=bundle.spec,
        text_encoder=_text_encoder(bundle),
        verify=verify,
        _lease=lease,
    )


def _text_encoder(bundle: Bundle) -> Path | None:
    """Return the folder of a bundle's text encoder, if there is one."""
    listed = {entry.path for entry in bundle.manifest.files}
    found = (a.path for a in bundle.manifest.artifacts if f"{a.path}/text_encoder/config.json" in listed)
    path = next(found, None)
    return None if path is None else bundle.file(path)


def _digest(weights: Sequence[Path]) -> str:
    """Return the sha256 of one file; for several files, the sha256 of their digests."""
    digests = map_files(sha256_file, weights, num_bytes=sum(stamp(path)[2] for path in weights))
    return digests[0] if len(digests) == 1 else sha256_bytes("".join(digests).encode())


def _hash_weights(weights: Sequence[Path], verify: Verify) -> tuple[str, tuple[Stamp, ...]]:
    """Return ``build_id`` and ``_hashed`` of a checkpoint."""
    stamps = tuple(stamp(path) for path in weights)  # before they are read
    digest = "" if verify == "none" else _digest(weights)
    return digest, stamps if digest and all(map(is_settled, stamps)) else ()


def _from_checkpoint(folder: Path, verify: Verify) -> Source:
    weights: tuple[Path, ...] = (folder / WEIGHTS_NAME,)
    if not weights[0].is_file():
        raise BundleError(f"no {WEIGHTS_NAME} in {folder}, expected the weights next to {CONFIG_NAME}. Copy it whole.")
    if (decoder := folder / DECODER_FOLDER / WEIGHTS_NAME).is_file():
        weights += (decoder,)
    models: list[Any] = []
    provenance = _checkpoint_provenance(folder)
    build_id, hashed = _hash_weights(weights, verify)

    def spec(num_inference_steps: int) -> SamplerSpec:
        # The shapes are known only after loading with torch; cached, so that it is loaded once.
        if not models:
            models.append(import_module("scm_sdk.runtimes.torch_backend").load_model(folder))
        found: SamplerSpec = models[0].spec(num_inference_steps)
        return found

    return Source(
        path=folder,
        build_id=build_id,
        artifacts=(Artifact(path=".", format="safetensors"),),
        parity=(),
        steps=CHECKPOINT_STEPS,
        bundle=None,
        provenance=provenance,
        status=ModelStatus.of(provenance),
        _spec=spec,
        verify=verify,
        _weights=weights,
        _hashed=hashed,
    )


def _checkpoint_provenance(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG_NAME).read_bytes())["provenance"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # loading the model raises the precise error
        return {}


def _from_pipeline(folder: Path, verify: Verify) -> Source:
    """Open a pipeline's folder as diffusers saved it, through PyTorch."""
    from ..model.foreign.component import weight_files
    from ..model.foreign.few_step_folder import FewStepFolder
    from ..model.foreign.pipelines import read_pipeline
    from ..model.foreign.sana_folder import OBJECTIVE, STEPS

    found = read_pipeline(folder)
    steps, objective = (
        (found.row.steps, found.row.objective) if isinstance(found, FewStepFolder) else (STEPS, OBJECTIVE)
    )
    weights = tuple(file for name in ("transformer", "vae") for file in weight_files(folder / name))
    build_id, hashed = _hash_weights(weights, verify)
    return Source(
        path=folder,
        build_id=build_id,
        artifacts=(Artifact(path=".", format="safetensors"),),
        parity=(),
        steps=steps,
        bundle=None,
        provenance={"objective": objective},
        status=ModelStatus.of({"objective": objective}),
        _spec=found.spec,
        text_encoder=folder if found.has_text_encoder else None,
        verify=verify,
        _weights=weights,
        _hashed=hashed,
    )
