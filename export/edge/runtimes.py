"""The runtimes that a bundle is exported to, and what their exporters get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import SUFFIXES, Artifact, Format
from scm_sdk.errors import ConfigError
from scm_sdk.spec import Precision, SamplerSpec

from ..precision.probe import feeds_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

BATCH = 1
"""Batch size of every edge artifact: NPUs and delegates take fixed shapes alone, and a phone shows one picture."""


class Exporter(Protocol):
    """A module of this package that writes the artifact of one runtime."""

    def export(self, source: EdgeSource, path: Path) -> tuple[str, ...]:
        """Write the artifact, with what belongs to it in the same folder; return notes for a person.

        Raises:
            ExportError: If the runtime's converter fails.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EdgeRuntime:
    """One line of ``RUNTIMES``.

    Attributes:
        format: The artifact's format, also the runtime's name.
        title: The runtime's own name.
        libraries: Import names of what converts, the converter first.
        extra: The extra that brings them.
        reads: What is converted: the checkpoint, or the graph of the same precision.
        precisions: Precisions that the converter makes.
        backend: The backend that runs it here; "" where nothing does.
    """

    format: Format
    title: str
    libraries: tuple[str, ...]
    extra: str
    reads: Literal["checkpoint", "graph"]
    precisions: tuple[Precision, ...] = ("fp32",)
    backend: str = ""

    @property
    def exporter(self) -> Exporter:
        """The module that converts."""
        module: Exporter = import_module(f".{self.format}", __package__)  # pyright: ignore[reportAssignmentType]
        return module

    def path(self, precision: str, steps: int) -> str:
        """Return where an artifact is in a bundle."""
        return f"edge/{self.format}/{precision}/{steps}step/model{SUFFIXES[self.format]}"


RUNTIMES: dict[str, EdgeRuntime] = {
    each.format: each
    for each in (
        EdgeRuntime(
            format="litert", title="LiteRT", libraries=("litert_torch", "ai_edge_litert", "torch"),
            extra="litert-export", reads="checkpoint", backend="litert",
        ),
        EdgeRuntime(
            format="executorch", title="ExecuTorch", libraries=("executorch.runtime", "torch"), extra="executorch",
            reads="checkpoint", backend="executorch",
        ),
        EdgeRuntime(
            format="openvino_ir", title="OpenVINO IR", libraries=("openvino", "onnx_ir"), extra="openvino",
            reads="graph", precisions=("fp32", "fp16"), backend="openvino_ir",
        ),
        EdgeRuntime(
            format="coreml", title="Core ML", libraries=("coremltools", "torch"), extra="coreml", reads="checkpoint",
            precisions=("fp32", "fp16"),
        ),
        EdgeRuntime(format="mnn", title="MNN", libraries=("MNN", "onnx_ir"), extra="mnn", reads="graph"),
    )
}  # fmt: skip


def edge_runtime(name: str) -> EdgeRuntime:
    """Look up a runtime, or raise ``ConfigError`` with the names there are."""
    if name not in RUNTIMES:
        raise ConfigError(f"runtime is {name!r}, expected one of {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]


@dataclass(frozen=True, kw_only=True)
class EdgeSource:
    """What an exporter converts.

    Attributes:
        bundle: The bundle.
        spec: The sampler.
        precision: Precision of the artifact.
        artifact: The checkpoint or the graph that is converted.
    """

    bundle: Bundle
    spec: SamplerSpec
    precision: Precision
    artifact: Artifact

    @property
    def path(self) -> Path:
        """The checkpoint's folder or the graph's file."""
        return self.bundle.file(self.artifact.path)

    def feeds(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Return the inputs of one sample by name, (1, ...), as ``Generator`` would feed them."""
        return feeds_of(self.spec, [seed])

    def sampler(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the sampler as a module that takes its inputs by name, and an example of them.

        Its output is a mapping with one name, ``spec.output_name``.
        """
        import torch

        from scm_sdk.model.consistency import ConsistencyModel
        from scm_sdk.model.networks.magnitude import bake_weights_
        from scm_sdk.model.sampler import Sampler

        class NamedSampler(torch.nn.Module):
            def __init__(self, sampler: Sampler) -> None:
                super().__init__()
                self.sampler = sampler

            def forward(self, **feeds: Tensor) -> Mapping[str, Tensor]:
                spec = self.sampler.spec
                return {spec.output_name: self.sampler(*(feeds[tensor.name] for tensor in spec.inputs))}

        model: Any = ConsistencyModel.from_pretrained(self.path).eval().requires_grad_(False)
        bake_weights_(model.network)
        return NamedSampler(Sampler(model, self.spec)).eval(), {
            name: torch.from_numpy(array) for name, array in self.feeds().items()
        }
