"""TensorRT and TensorRT-RTX: one backend for both libraries.

Each batch size has execution contexts (``context_pool``), each with fixed shapes, a stream, and buffers. A thread
takes a free one or makes one. With TensorRT a context records a CUDA graph on its second run; TensorRT-RTX records
graphs itself. This file runs on a GPU only; what is checked before that is in ``engine_file``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scm_sdk._util.cache_dir import trusted_folder, writable_folder
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.gpu import parse_device
from scm_sdk.bundle.engine_record import BuildRecord
from scm_sdk.engines.compatibility import EngineHost, is_trusted, performance_warning
from scm_sdk.engines.tensorrt import EXTRAS, LibraryObject, load_flavor, make_logger
from scm_sdk.errors import BackendUnavailable, ConfigError, IncompatibleEngineError, ScmError, ShapeError
from scm_sdk.spec import SamplerSpec

from ..base import check_images, check_inputs, check_num_threads, name_inputs
from .context import ExecutionContext, own_errors
from .context_pool import ContextPool
from .device_memory import Cuda, Handle, OutOfMemory
from .engine_file import read_engine, rebuild

if TYPE_CHECKING:
    import torch

_RUNTIME = "runtime"
_VALIDITY = {
    1: "another version of the library", 2: "another kind of GPU", 4: "the driver is too old",
    8: "the CUDA runtime is too old", 16: "too little GPU memory", 32: "the file is malformed", 64: "a CUDA error",
}  # fmt: skip


class TrtBackend:
    """One engine; see ``Backend``. Thread-safe.

    Args:
        artifact_path: The ``.engine`` file; ``build.json`` is in the same folder.
        spec: The sampler in the manifest.
        device: ``"cuda"`` or ``"cuda:N"``; None is the first GPU.
        num_threads: Ignored: an engine runs on the GPU.
        trust_engines: Allow a version-compatible engine of any origin to run its code on the host.

    Raises:
        ConfigError: If ``device`` is not a GPU.
        IntegrityError: If a file is missing, altered or truncated, or belongs to another sampler.
        BackendUnavailable: If the library, the driver or a GPU is missing.
        IncompatibleEngineError: If the engine was built for another system, version or GPU.
    """

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
        self.name = self.record.flavor
        self.device = f"cuda:{index}"
        self.spec = spec
        self._path = artifact_path
        self._trt = load_flavor(self.record.flavor, purpose=f"backend {self.record.flavor!r}")
        self._cuda = Cuda(index, extra=EXTRAS[self.record.flavor])
        self._log = make_logger(self._trt)
        self._trusted = trust_engines or is_trusted(self.record.engine_sha256)
        self._engine: LibraryObject = self._deserialize(blob)
        _check_tensors(self._trt, self._engine, self.record, artifact_path)
        self._gpu_name = host.gpu.name if host.gpu is not None else "none"
        with own_errors("preparing the engine"):
            self._config = self._runtime_config()
        self._pool = ContextPool(self._make_context, name=self.name)
        if slower := performance_warning(self.record.flavor, self.record.facts, host):
            warnings.warn(
                f"{artifact_path}: {slower}; it may be slower than one built here", RuntimeWarning, stacklevel=4
            )

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Backend.sample``."""
        feeds = check_inputs(self.spec, noise, conditioning)
        batch = len(noise[0])
        self._check_batch(batch)
        with self._pool.context(batch) as context:
            images = context.run(feeds)
        return check_images(self.spec, images, batch, backend=self.name)

    def sample_torch(self, noise: Sequence[object], conditioning: Mapping[str, object]) -> torch.Tensor:
        """Run on tensors on the GPU, without a copy and without waiting for the GPU.

        Args:
            noise: One ``(B, *sample_shape)`` float32 CUDA tensor per step, or an object with ``__dlpack__``.
            conditioning: The other inputs by name.

        Returns:
            ``(B, *image_shape)`` float32 torch tensor on the same GPU, ordered after torch's current stream.

        Raises:
            ShapeError: If a tensor is missing, does not match, or is not on this GPU.
            BackendFailure: If the engine cannot be run.
        """
        import torch
        import torch.utils.dlpack

        tensors = {}
        batch = 0
        for name, value in name_inputs(self.spec, noise, conditioning).items():
            tensor = value if isinstance(value, torch.Tensor) else torch.utils.dlpack.from_dlpack(value)
            batch = batch or (len(tensor) if tensor.ndim else 0)
            self._check_tensor(name, tensor, batch, str(tensor.dtype).removeprefix("torch."))
            tensors[name] = tensor.contiguous()
        self._check_batch(batch)
        with torch.cuda.device(self.device):  # restore the caller's current device
            images = torch.empty((batch, *self.spec.image_shape), dtype=torch.float32, device=self.device)
            addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
            addresses[self.spec.output_name] = images.data_ptr()
            self._enqueue(addresses, batch, torch.cuda.current_stream().cuda_stream)
        return images

    def close(self) -> None:
        """Release the GPU memory after the running calls have finished."""
        self._pool.close()
        self._engine = None
        self._keep_runtime_cache()

    def _enqueue(self, addresses: Mapping[str, int], batch: int, stream: Handle) -> None:
        """Enqueue the engine between the past and the future work of the caller's stream."""
        with self._pool.context(batch, buffers=False) as context:
            context.bind(addresses)
            self._cuda.order(stream, context.stream)
            context.execute()
            self._cuda.order(context.stream, stream)

    def _make_context(self, batch: int, buffers: bool) -> ExecutionContext:
        self._cuda.use()
        with own_errors("making a context"):
            context = (
                self._engine.create_execution_context(self._config)
                if self._config is not None
                else self._engine.create_execution_context()
            )
        if context is None:
            free, need = self._cuda.free_bytes(), self._engine.device_memory_size_v2
            raise OutOfMemory(
                f"{self._path} needs {need / 2**20:.0f} MiB of GPU memory to run, {free / 2**20:.0f} MiB are free. "
                "Close what else runs there, or build it for smaller batches."
            )
        record = buffers and self.name == "tensorrt"
        return ExecutionContext(
            self._cuda, context, self.spec, batch, record=record, buffers=buffers, rebuild=rebuild(self.record)
        )

    def _check_tensor(self, name: str, tensor: torch.Tensor, batch: int, dtype: str) -> None:
        wanted = next(t for t in self.spec.inputs if t.name == name)
        shape = (batch, *wanted.shape)
        if tuple(tensor.shape) != shape or dtype != wanted.dtype or str(tensor.device) != self.device:
            raise ShapeError(
                f"{name} is {tuple(tensor.shape)} {dtype} on {tensor.device}, expected {shape} {wanted.dtype} on "
                f"{self.device}."
            )

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
                raise IncompatibleEngineError(f"{self._path} cannot run here: {found}. {rebuild(self.record)}")
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
            raise IncompatibleEngineError(
                f"{self._path} was refused by {self.name}: {said[:400]}. {rebuild(self.record)}"
            )
        self._runtime = runtime  # an engine does not hold a reference to its runtime
        return engine

    def _runtime_config(self) -> Any:
        """Return the runtime options of TensorRT-RTX: record CUDA graphs, cache compiled kernels."""
        if self.name != "tensorrt_rtx":
            return None
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # By default a generic kernel runs until the specialized one is compiled, so the bits of a seed would change.
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        self._runtime_cache = config.create_runtime_cache()
        folder = trusted_folder(_RUNTIME)  # what it holds is run
        with suppress(OSError, RuntimeError, ValueError):  # a missing or refused cache counts as empty
            if folder is not None:
                self._runtime_cache.deserialize((folder / self._runtime_cache_name()).read_bytes())
        config.set_runtime_cache(self._runtime_cache)
        return config

    def _keep_runtime_cache(self) -> None:
        config, self._config = self._config, None
        if config is not None:
            with suppress(ScmError), own_errors("keeping compiled kernels"):  # they only save time
                serialized = self._runtime_cache.serialize()
                folder = writable_folder(_RUNTIME, purpose="TensorRT-RTX compiles its kernels again in each process")
                if serialized is not None and folder is not None:
                    atomic_write_bytes(folder / self._runtime_cache_name(), bytes(memoryview(serialized)))

    def _runtime_cache_name(self) -> str:
        gpu = self._gpu_name.replace(" ", "_")
        return f"{self.record.engine_sha256[:16]}-{gpu}.cache"


def _index(device: str | None) -> int:
    kind, index = parse_device(device or "cuda")
    if kind != "cuda":
        raise ConfigError(f"device is {device!r}, expected 'cuda' or 'cuda:N' for an engine.")
    return index or 0


def _check_tensors(trt: Any, engine: Any, record: BuildRecord, path: Path) -> None:
    """Compare inputs, outputs, dtypes and batch range of the engine with its record."""
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
        raise IncompatibleEngineError(
            f"{path} has tensors {found}, expected {wanted} from its record. {rebuild(record)}"
        )
    for tensor in record.inputs:
        sizes = tuple(shape[0] for shape in engine.get_tensor_profile_shape(tensor.name, 0))
        if sizes != record.facts.batch:
            raise IncompatibleEngineError(
                f"{path} takes batches {sizes} of {tensor.name}, expected {record.facts.batch} from its record. "
                f"{rebuild(record)}"
            )


open_backend = TrtBackend
