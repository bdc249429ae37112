"""TensorRT and TensorRT-RTX: one backend for both, since they run engines through one interface.

Each batch size has lanes of its own: a context with fixed shapes and addresses, a stream, and buffers. A thread
takes a free lane or makes one. With TensorRT a lane records a CUDA graph on its second run; TensorRT-RTX records
graphs itself. This file runs on a GPU only; what is checked before that is in ``engine_file``.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk.build_record import BuildRecord
from scm_sdk.engine_fit import EngineHost, doubt, is_trusted
from scm_sdk.errors import BackendFailure, BackendUnavailable, ConfigError, IncompatibleEngineError, ShapeError
from scm_sdk.files import atomic_write_bytes
from scm_sdk.spec import SamplerSpec
from scm_sdk.trt import EXTRAS, load_flavour, make_logger
from scm_sdk.user_cache import cache_folder

from .base import check_images, check_inputs, check_num_threads
from .device_memory import Cuda
from .engine_file import REBUILD, read_engine
from .engine_lane import Lane

MAX_IDLE_LANES = 8
"""Lanes that are kept for the next call; the longest unused goes first."""
_VALIDITY = {
    1: "another version of the library", 2: "another kind of GPU", 4: "the driver is too old",
    8: "the CUDA runtime is too old", 16: "too little GPU memory", 32: "the file is malformed", 64: "a CUDA error",
}  # fmt: skip


def open_backend(
    artifact_path: Path,
    spec: SamplerSpec,
    *,
    device: str | None = None,
    num_threads: int | None = None,
    trust_engines: bool = False,
) -> TrtBackend:
    """Load an engine, of whichever of the two libraries its record names.

    Args:
        artifact_path: The ``.engine`` file; ``build.json`` lies beside it.
        spec: What the manifest says the sampler is.
        device: ``"cuda"`` or ``"cuda:N"``; None is the first GPU.
        num_threads: No effect: an engine runs on the GPU.
        trust_engines: Let a version-compatible engine run its code on the host, wherever it comes from.

    Raises:
        ConfigError: If ``device`` is no GPU.
        IntegrityError: If a file is missing, altered or truncated, or is of another sampler.
        BackendUnavailable: If the library, the driver or a GPU is not here.
        IncompatibleEngineError: If the engine was built for another system, version or GPU.
    """
    return TrtBackend(artifact_path, spec, device=device, num_threads=num_threads, trust_engines=trust_engines)


class TrtBackend:
    """One engine; see ``Backend``. Safe for threads."""

    name = "tensorrt"

    def __init__(
        self,
        artifact_path: Path,
        spec: SamplerSpec,
        *,
        device: str | None = None,
        num_threads: int | None = None,
        trust_engines: bool = False,
    ) -> None:
        check_num_threads(num_threads)
        index = _index(device)
        host = EngineHost.here(device=f"cuda:{index}", trust_engines=trust_engines)
        self.record, blob = read_engine(artifact_path, spec, host)
        self.name = self.record.flavour
        self.device = f"cuda:{index}"
        self.spec = spec
        self._path = artifact_path
        self._trt = load_flavour(self.record.flavour, purpose=f"backend {self.record.flavour!r}")
        self._cuda = Cuda(index, extra=EXTRAS[self.record.flavour])
        self._log = make_logger(self._trt)
        self._trusted = trust_engines or is_trusted(self.record.engine_sha256)
        self._engine = self._deserialize(blob)
        _check_tensors(self._trt, self._engine, self.record, artifact_path)
        self._config = self._runtime_config()
        self._lanes: list[Lane] = []
        self._lock = threading.Lock()
        if slower := doubt(self.record.flavour, self.record.facts, host):
            warnings.warn(
                f"{artifact_path}: {slower}; it may be slower than one built here", RuntimeWarning, stacklevel=4
            )

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Backend.sample``."""
        feeds = check_inputs(self.spec, noise, conditioning)
        batch = len(noise[0])
        lane = self._take(batch)
        try:
            images = lane.run(feeds)
        except BaseException:
            lane.close()
            raise
        self._give_back(lane)
        return check_images(self.spec, images, batch, backend=self.name)

    def sample_torch(self, noise: Sequence[Any], conditioning: Mapping[str, Any]) -> Any:
        """Run on tensors that are on the GPU already, without a copy and without waiting for the GPU.

        Args:
            noise: One (B, *sample_shape) float32 CUDA tensor for each step, or anything with ``__dlpack__``.
            conditioning: The other inputs by name.

        Returns:
            (B, *image_shape) float32 torch tensor on the same GPU, ordered after torch's current stream.

        Raises:
            ShapeError: If a tensor does not fit, or is not on this GPU.
            BackendFailure: If the engine cannot be run.
        """
        import torch
        import torch.utils.dlpack

        named = {t.name: x for t, x in zip(self.spec.noise_inputs, noise, strict=True)} | dict(conditioning)
        tensors = {}
        for tensor in self.spec.inputs:
            value = named[tensor.name]
            value = (value if isinstance(value, torch.Tensor) else torch.utils.dlpack.from_dlpack(value)).contiguous()
            shape, dtype = (len(noise[0]), *tensor.shape), getattr(torch, tensor.dtype)
            if tuple(value.shape) != shape or value.dtype != dtype or str(value.device) != self.device:
                raise ShapeError(
                    f"{tensor.name} is {tuple(value.shape)} {value.dtype} on {value.device}, expected {shape} {dtype} "
                    f"on {self.device}."
                )
            tensors[tensor.name] = value
        batch = len(noise[0])
        self._check_batch(batch)
        images = torch.empty((batch, *self.spec.image_shape), dtype=torch.float32, device=self.device)
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        lane = self._take(batch, addresses={**addresses, self.spec.output_name: images.data_ptr()})
        current = torch.cuda.current_stream(images.device)
        self._cuda.order(current.cuda_stream, lane.stream)
        lane.execute()
        self._cuda.order(lane.stream, current.cuda_stream)
        self._cuda.synchronize(lane.stream)  # the context may go when its work is done
        lane.close()
        return images

    def close(self) -> None:
        """Give the GPU's memory back; calls that are running finish first."""
        with self._lock:
            lanes, self._lanes = self._lanes, []
            engine, self._engine = self._engine, None
        for lane in lanes:
            lane.close()
        self._keep_runtime_cache()
        del engine

    def _take(self, batch: int, *, addresses: Mapping[str, int] | None = None) -> Lane:
        self._check_batch(batch)
        with self._lock:
            if self._engine is None:
                raise BackendFailure(f"this {self.name} backend was closed, expected an open one. Open it again.")
            self._cuda.use()
            if addresses is None:
                for lane in self._lanes:
                    if lane.batch == batch:
                        self._lanes.remove(lane)
                        return lane
            context = (
                self._engine.create_execution_context(self._config)
                if self._config is not None
                else self._engine.create_execution_context()
            )
        if context is None:
            free, need = self._cuda.free_bytes(), self._engine.device_memory_size_v2
            raise BackendFailure(
                f"{self._path} needs {need / 2**20:.0f} MiB of GPU memory to run, {free / 2**20:.0f} MiB are free. "
                "Close what else runs there, or build it for smaller batches."
            )
        return Lane(
            self._trt, self._cuda, context, self.spec, batch, record=self.name == "tensorrt", addresses=addresses
        )

    def _give_back(self, lane: Lane) -> None:
        dropped: Lane | None = None
        with self._lock:
            if self._engine is None:
                dropped = lane
            else:
                self._lanes.append(lane)
                if len(self._lanes) > MAX_IDLE_LANES:
                    dropped = self._lanes.pop(0)
        if dropped is not None:
            dropped.close()

    def _check_batch(self, batch: int) -> None:
        least, _, most = self.record.facts.batch
        if not least <= batch <= most:
            raise ShapeError(
                f"a batch of {batch} was given to {self._path}, expected {least}..{most}, which it was built for. "
                "Split the request, or build it with --batch."
            )

    def _deserialize(self, blob: bytes) -> Any:
        runtime = self._trt.Runtime(self._log)
        if self.name == "tensorrt_rtx":
            validity, bits = runtime.get_engine_validity(blob)
            if validity == self._trt.EngineValidity.INVALID:
                found = ", ".join(text for bit, text in _VALIDITY.items() if int(bits) & bit) or "no reason given"
                raise IncompatibleEngineError(f"{self._path} cannot run here: {found}. {REBUILD}")
        if self.record.facts.version_compatible:
            if not self._trusted:
                raise BackendUnavailable(
                    f"{self._path} holds code that runs on the host, expected one that you trust. If you do, pass "
                    "trust_engines=True, or build it here: scm-export engine"
                )
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(blob)
        if engine is None:
            said = " ".join(self._log.errors()) or "nothing"
            raise IncompatibleEngineError(f"{self._path} was refused by {self.name}: {said[:400]}. {REBUILD}")
        self._runtime = runtime  # an engine does not keep its runtime
        return engine

    def _runtime_config(self) -> Any:
        """Return what TensorRT-RTX wants to know: record CUDA graphs, and keep the kernels it compiles."""
        if self.name != "tensorrt_rtx":
            return None
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._runtime_cache = config.create_runtime_cache()
        path = self._runtime_cache_path()
        if path.exists():
            self._runtime_cache.deserialize(path.read_bytes())
        config.set_runtime_cache(self._runtime_cache)
        return config

    def _keep_runtime_cache(self) -> None:
        if self._config is not None:
            serialized = self._runtime_cache.serialize()
            if serialized is not None:
                atomic_write_bytes(self._runtime_cache_path(), bytes(memoryview(serialized)))
            self._config = None

    def _runtime_cache_path(self) -> Path:
        host = EngineHost.here(device=self.device)
        gpu = host.gpu.name.replace(" ", "_") if host.gpu is not None else "none"
        return cache_folder() / "runtime" / f"{self.record.engine_sha256[:16]}-{gpu}.cache"


def _index(device: str | None) -> int:
    kind, _, number = (device or "cuda").partition(":")
    if kind != "cuda" or not (number.isdecimal() or device in (None, "cuda")):
        raise ConfigError(f"device is {device!r}, expected 'cuda' or 'cuda:N' for an engine.")
    return int(number or 0)


def _check_tensors(trt: Any, engine: Any, record: BuildRecord, path: Path) -> None:
    """Hold the engine's own inputs, outputs, types and batch range against its record."""
    kinds = {"FLOAT": "float32", "INT64": "int64"}
    found = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        mode = "in" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "out"
        dtype = str(engine.get_tensor_dtype(name)).rpartition(".")[2]
        found[name] = (mode, kinds.get(dtype, dtype), tuple(engine.get_tensor_shape(name)))
    wanted = {t.name: ("in", t.dtype, t.shape) for t in record.inputs}
    wanted |= {t.name: ("out", t.dtype, t.shape) for t in record.outputs}
    if found != wanted:
        raise IncompatibleEngineError(f"{path} has tensors {found}, expected {wanted} from its record. {REBUILD}")
    for tensor in record.inputs:
        sizes = tuple(shape[0] for shape in engine.get_tensor_profile_shape(tensor.name, 0))
        if sizes != record.facts.batch:
            raise IncompatibleEngineError(
                f"{path} takes batches {sizes} of {tensor.name}, expected {record.facts.batch} from its record. "
                f"{REBUILD}"
            )
