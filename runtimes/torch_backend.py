"""Run the sampler with PyTorch, the reference of every other backend.

Opens a checkpoint folder (``config.json`` + safetensors) and unrolls it over ``spec.times``, for any number of steps.
TF32 is disabled during a call, for convolutions and matrix products.

Asked for bf16, on a CPU, it computes convolutions and matrix products in it, by autocast, and stores their weights in
it. Float32 stay norms, sums and the embedding of the time, as in training (``scm_sdk.train.parallel.mixed``).

Threads: ``sample`` may be called from many threads and runs one call at a time, because the number
of CPU threads and the TF32 switch belong to the whole process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from scm_sdk._util.lazy import require
from scm_sdk._util.processor import limited_threads
from scm_sdk.bundle.layout import DECODER_FOLDER, INDEX_NAME
from scm_sdk.bundle.manifest import image_size
from scm_sdk.bundle.verify import stamp
from scm_sdk.errors import BackendFailure, BackendUnavailable, ConfigError, ScmError
from scm_sdk.spec import Precision, SamplerSpec

from .base import check_artifact, check_images, check_inputs, check_num_threads, first_line

if TYPE_CHECKING:
    from scm_sdk.model.consistency import ConsistencyModel

_RUNNING = threading.Lock()  # one per process, see the docstring of the module
_LOADING = threading.Lock()
_MODELS: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()
"""Checkpoints in use; samplers with different numbers of steps share one copy of the weights."""


def _renew_locks() -> None:
    """Replace the locks in a forked process, because a thread of the parent may hold them."""
    global _RUNNING, _LOADING
    _RUNNING, _LOADING = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def cannot_compute(precision: str) -> str:
    """Return why PyTorch cannot compute in a precision on this CPU, as it says itself; "" if it can."""
    torch: Any = require("torch", extra="torch", purpose="backend 'torch'")
    able = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)  # what its own compiler asks
    if torch.backends.mkldnn.is_available() and able is not None and able():
        return ""
    return f"torch {torch.__version__} has no {precision} kernels for this CPU"


def load_model(folder: Path, *, device: str | None = None, precision: Precision | None = None) -> ConsistencyModel:
    """Load a checkpoint in evaluation mode, or return the copy that is already in use.

    With ``precision="bf16"`` the weights of a layer are stored in it when autocast first calls the layer.

    Raises:
        BackendUnavailable: If torch or the device is not here.
        BundleError: If the folder is missing or its files are damaged.
    """
    torch = require("torch", extra="torch", purpose="backend 'torch'")
    check_artifact(folder, is_folder=True)
    target = _device(torch, device)
    # The stamps of the files are part of the key, so that a rewritten checkpoint is loaded again.
    is_pipeline = (folder / INDEX_NAME).is_file()
    files = folder.rglob("*") if is_pipeline else [*folder.iterdir(), *(folder / DECODER_FOLDER).glob("*")]
    stamps = tuple(sorted((str(file), stamp(file)) for file in files if file.is_file()))
    key = (str(folder.resolve()), stamps, str(target), precision)
    with _LOADING:
        model = _MODELS.get(key)
        if model is None:
            from scm_sdk.model.consistency import ConsistencyModel
            from scm_sdk.model.networks.magnitude import bake_weights_

            model = ConsistencyModel.from_pretrained(folder).eval().requires_grad_(False).to(target)
            bake_weights_(model.network)
            if precision == "bf16":
                for module in model.modules():
                    if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                        module.register_forward_pre_hook(_store_low)
            _MODELS[key] = model
    return model


class TorchBackend:
    """``scm_sdk.model.sampler.Sampler`` over one checkpoint; see ``Backend``.

    Args:
        artifact_path: Folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``.
        spec: The sampler to run.
        device: A torch device such as ``"cuda"`` or ``"cuda:1"``; None is ``"cpu"``.
        num_threads: CPU threads of one call; None leaves torch's own choice, within the cores of a container.
        precision: ``"bf16"`` computes convolutions and matrix products in it, on a CPU; None computes in float32.

    Raises:
        BackendUnavailable: If torch or the device is not here.
        BundleError: If the folder is missing or its files are damaged.
    """

    name = "torch"

    def __init__(
        self,
        artifact_path: Path,
        spec: SamplerSpec,
        *,
        device: str | None = None,
        num_threads: int | None = None,
        precision: Precision | None = None,
    ) -> None:
        self._torch = require("torch", extra="torch", purpose="backend 'torch'")
        check_num_threads(num_threads)
        self.spec = spec
        self.device = str(_device(self._torch, device))
        self._num_threads = num_threads
        from scm_sdk.model.sampler import Sampler

        if precision is not None and self.device != "cpu":
            raise BackendUnavailable(
                f"device is {device!r}, but backend 'torch' computes {precision} on CPUs. Use device='cpu'."
            )
        self._precision = precision
        model = load_model(artifact_path, device=device, precision=precision)
        if spec.sample_shape != model.config.sample_shape and (artifact_path / INDEX_NAME).is_file():
            model = model.at_size(*image_size([spec]))  # of a bundle with several, which share the weights
        self._sampler: Any = Sampler(model, spec).eval().to(self.device)

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Backend.sample``."""
        feeds = check_inputs(self.spec, noise, conditioning)
        sampler, torch = self._sampler, self._torch
        if sampler is None:
            raise BackendFailure("this torch backend was closed, expected an open one. Open the generator again.")
        try:
            with _RUNNING, torch.inference_mode(), self._settings(), self._arithmetic():
                tensors = [torch.tensor(array, device=self.device) for array in feeds.values()]
                images = sampler(*tensors).to("cpu", torch.float32).numpy()
        except ScmError:
            raise
        except Exception as exc:
            raise BackendFailure(
                f"torch failed on a batch of {len(noise[0])} on {self.device}: {first_line(exc)}. "
                "Expected images; try a smaller batch_size or device='cpu'."
            ) from exc
        return check_images(self.spec, images, len(noise[0]), backend="torch")

    @property
    def model(self) -> ConsistencyModel:
        """The model, for evaluation at other times than those of the sampler."""
        if self._sampler is None:
            raise BackendFailure("this torch backend was closed, expected an open one. Open the generator again.")
        model: ConsistencyModel = self._sampler.model
        return model

    def close(self) -> None:
        """Release the weights; the last sampler that uses them frees the memory."""
        self._sampler = None

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self._precision is None:
            return nullcontext()
        # Without its cache: the weights are stored in bf16, and other casts are made again by each call.
        autocast: AbstractContextManager[Any] = self._torch.autocast(
            "cpu", dtype=self._torch.bfloat16, cache_enabled=False
        )
        return autocast

    @contextmanager
    def _settings(self) -> Iterator[None]:
        torch = self._torch
        if self.device.startswith("cuda"):
            with _full_precision(torch):
                yield
            return
        before = torch.get_num_threads()
        threads = self._num_threads or min(before, limited_threads() or before)
        if threads != before:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


@contextmanager
def _full_precision(torch: Any) -> Iterator[None]:
    """Disable TF32 and algorithm selection on a GPU, regardless of the settings of the program."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    switches: list[tuple[Any, str, object]]
    if hasattr(cuda.matmul, "fp32_precision"):  # since PyTorch 2.9, which refuses to mix both interfaces
        switches = [(each, "fp32_precision", "ieee") for each in (cuda.matmul, cudnn.conv, cudnn.rnn)]
    else:
        switches = [(each, "allow_tf32", False) for each in (cuda.matmul, cudnn)]
    switches.append((cudnn, "benchmark", False))
    before = [getattr(where, name) for where, name, _ in switches]
    try:
        for where, name, value in switches:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(switches, before, strict=True):
            setattr(where, name, value)


def _store_low(module: Any, inputs: object) -> None:
    """Store a layer's weight as autocast would cast it for each call; where it is off, the layer stays float32."""
    import torch

    if torch.is_autocast_enabled("cpu") and module.weight.dtype == torch.float32:
        module.weight.data = module.weight.data.to(torch.bfloat16)


def _device(torch: Any, device: str | None) -> Any:
    try:
        target = torch.device(device or "cpu")
    except (RuntimeError, TypeError) as exc:
        raise ConfigError(f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:N' for backend 'torch'.") from exc
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"device is {device!r}, but torch sees {torch.cuda.device_count()} CUDA devices. "
            "Use device='cpu', or install a CUDA build of torch and its driver. See: scm-export doctor"
        )
    return target


open_backend = TorchBackend
