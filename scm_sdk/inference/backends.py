"""The backends: the protocol that each implements, the table of their names, and opening one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .._util.arguments import nearest_hint
from .._util.forked import survive_fork
from ..bundle.manifest import Artifact
from ..errors import ConfigError
from ..spec import Precision, SamplerSpec, TensorSpec

__all__ = ["BACKENDS", "Backend", "BackendInfo", "Graph", "backend_info", "open_backend", "open_graph"]


@runtime_checkable
class Backend(Protocol):
    """Interface of a backend, which maps noise to images: ``spec``, ``sample`` and ``close``.

    A protocol, not a base class, so that test doubles and custom runtimes need no import of scm-sdk. Opening loads the
    artifact and allocates memory; ``close`` releases it and may be called twice. ``sample`` may be called from many
    threads at once; a backend whose library is not thread-safe takes a lock. Reports use the optional ``name`` and
    ``device``.
    """

    spec: SamplerSpec

    def sample(self, noise: Sequence[np.ndarray], conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run the whole sampler once.

        Args:
            noise: Standard normal, one ``(B, *sample_shape)`` float32 array per step.
            conditioning: The tensors of ``spec.conditioning_inputs`` by name, ``(B, *shape)``.

        Returns:
            ``(B, *image_shape)`` float32, data units, not clipped; owned by the caller.

        Raises:
            ShapeError: If an input does not match ``spec``.
            BackendFailure: If the library raised, or the backend is closed.
        """
        ...

    def close(self) -> None:
        """Release the memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """Entry of ``BACKENDS``: module and requirements of a backend.

    Attributes:
        module: The module whose class, ``open_backend(artifact_path, spec, *, device, num_threads)``, is the backend.
        library: Import name of its library.
        extra: The extra that installs the library.
        opens: The artifact formats it can open.
        computes: Lower precisions that it computes an artifact in on a CPU, by the artifact's own. Its module then
            has ``cannot_compute(precision)``, which returns the reason why it cannot here, or "".
        unfit: The precisions among them that it must not run, each with the reason.
        one_at_a_time: Whether calls from several threads wait for one another.
        runs_graphs: Whether its module also has ``open_graph``, for graphs that are no samplers.
    """

    module: str
    library: str
    extra: str
    opens: tuple[str, ...]
    computes: Mapping[str, tuple[Precision, ...]] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)
    one_at_a_time: bool = False
    runs_graphs: bool = False

    def takes(self, artifact: Artifact) -> bool:
        """Return whether this backend opens the format of an artifact, and is suitable for its precision."""
        return artifact.format in self.opens and artifact.precision not in self.unfit

    def needs_cpu_class(self, precision: str, device: str | None) -> bool:
        """Return whether images in a precision depend on the class of the CPU, as bf16 computed by the library does."""
        return precision == "bf16" and bool(self.computes) and (device or "cpu") == "cpu"

    def cannot_compute(self, precision: str) -> str:
        """Return the library's reason why it cannot compute in a precision on this machine; "" if it can."""
        reason: str = import_module(self.module).cannot_compute(precision)
        return reason

    @property
    def runs_engines(self) -> bool:
        """Whether the artifacts are engines: executable code that fits only some machines."""
        return self.module == _TENSORRT


_TENSORRT = "scm_sdk.runtimes.tensorrt.backend"
BACKENDS: dict[str, BackendInfo] = {  # in order of preference without measurements
    "tensorrt": BackendInfo(module=_TENSORRT, library="tensorrt", extra="tensorrt", opens=("tensorrt",)),
    "tensorrt_rtx": BackendInfo(
        module=_TENSORRT, library="tensorrt_rtx", extra="tensorrt-rtx", opens=("tensorrt_rtx",)
    ),
    "onnxruntime": BackendInfo(
        module="scm_sdk.runtimes.ort_backend",
        library="onnxruntime",
        extra="onnxruntime",
        opens=("onnx",),
        runs_graphs=True,
    ),
    "openvino": BackendInfo(
        module="scm_sdk.runtimes.openvino_backend",
        library="openvino",
        extra="openvino",
        opens=("onnx",),
        unfit={
            # OpenVINO fuses them into signed int8 kernels, which saturate on a CPU without VNNI: 10 dB measured.
            "int8": "int8 graphs are for engines; for a CPU: scm-export quantize --to int8-cpu",
            # OpenVINO computes in float32 anyway, and 2026.4 may compute a cast float16 product wrong.
            **dict.fromkeys(("int8-weights", "int4"), "its products are operators of ONNX Runtime alone"),
            "fp16": "fp16 is for GPUs; OpenVINO computes it in float32: take fp32, or bf16",
        },
        computes={"fp32": ("bf16",)},
        runs_graphs=True,
    ),
    "torch": BackendInfo(
        module="scm_sdk.runtimes.torch_backend",
        library="torch",
        extra="torch",
        opens=("safetensors",),
        computes={"fp32": ("bf16",)},
        one_at_a_time=True,
    ),
    # Of phones and embedded machines: artifacts of scm-export edge, each for one batch size.
    "openvino_ir": BackendInfo(
        module="scm_sdk.runtimes.openvino_ir_backend",
        library="openvino",
        extra="openvino",
        opens=("openvino_ir",),
        one_at_a_time=True,
    ),
    "litert": BackendInfo(
        module="scm_sdk.runtimes.litert_backend",
        library="ai_edge_litert",
        extra="litert",
        opens=("litert",),
        one_at_a_time=True,
    ),
    "executorch": BackendInfo(
        module="scm_sdk.runtimes.executorch_backend",
        library="executorch.runtime",
        extra="executorch",
        opens=("executorch",),
        one_at_a_time=True,
    ),
}


def open_backend(
    name: str,
    artifact_path: Path,
    spec: SamplerSpec,
    *,
    device: str | None = None,
    num_threads: int | None = None,
    trust_engines: bool = False,
    precision: Precision | None = None,
) -> Backend:
    """Open one artifact with one backend, without a bundle or a plan.

    ``trust_engines`` lets an engine run code on the host; see ``Generator.from_pretrained``. ``precision`` is a lower
    one than the artifact's, of those that ``BackendInfo.computes`` names; None computes in the artifact's.

    Raises:
        ConfigError: If no backend has this name, or it computes in no such precision.
        BackendUnavailable: If its library or the device is not here.
        BundleError: If the artifact is missing, damaged or not what ``spec`` says.
    """
    info = backend_info(name)
    options: dict[str, Any] = {"device": device, "num_threads": num_threads}
    if info.runs_engines:
        options["trust_engines"] = trust_engines
    if precision is not None:
        if not any(precision in each for each in info.computes.values()):
            able = [
                each for each, other in BACKENDS.items() if any(precision in low for low in other.computes.values())
            ]
            raise ConfigError(
                f"precision is {precision!r} for backend {name!r}, expected None, or one of the backends "
                f"{', '.join(able) or 'none'}, which compute an artifact in it."
            )
        options["precision"] = precision
    backend: Backend = import_module(info.module).open_backend(artifact_path, spec, **options)
    survive_fork(backend)
    return backend


class Graph(Protocol):
    """An open graph that is no sampler, with declared inputs and outputs; thread-safe."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for inputs by name; axis 0 is the batch."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...


def open_graph(
    path: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    num_threads: int | None = None,
) -> Graph:
    """Open a graph that is no sampler, such as an encoder.

    Args:
        path: The ``.onnx`` file.
        inputs: Its inputs in order.
        outputs: Its outputs in order.
        backend: A name in ``BACKENDS``; ONNX Runtime runs the graph for those whose library has no ``open_graph``.
        device: As in ``open_backend``.
        num_threads: As in ``open_backend``.

    Raises:
        BackendUnavailable: If the library or the device is not here.
        IntegrityError: If the file is missing, damaged, or has other inputs or outputs.
    """
    info = backend_info(backend)
    graph: Graph = import_module((info if info.runs_graphs else BACKENDS["onnxruntime"]).module).open_graph(
        path, inputs, outputs, device=device, num_threads=num_threads
    )
    survive_fork(graph)
    return graph


def backend_info(name: str) -> BackendInfo:
    """Look up a backend, or raise ``ConfigError`` with the known names."""
    if name not in BACKENDS:
        raise ConfigError(
            f"backend is {name!r}, expected 'auto' or one of {', '.join(sorted(BACKENDS))}."
            f"{nearest_hint(name, BACKENDS)}"
        )
    return BACKENDS[name]
