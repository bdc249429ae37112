"""ExecuTorch: the sampler as a ``.pte`` program for phones, lowered to XNNPACK.

A program does not name its inputs: they are in the order of the spec.

ExecuTorch 1.5.1 drops the argument of ``gelu(x, approximate="tanh")`` when it lowers the node to XNNPACK, which then
computes the exact GELU, silently, up to 4.7e-4 off. Such a node stays with ExecuTorch's portable kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scm_sdk.errors import ExportError

from .converters import quiet
from .runtimes import EdgeSource


def export(source: EdgeSource, path: Path) -> tuple[str, ...]:
    """Convert the checkpoint with ExecuTorch's XNNPACK partitioner; see ``Exporter``."""
    import torch
    from executorch.exir import to_edge_transform_and_lower

    module, feeds = source.sampler()
    sampler: Any = module.sampler
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                sampler, tuple(feeds[tensor.name] for tensor in source.spec.inputs), strict=False
            )
            lowered = to_edge_transform_and_lower(program, partitioner=[partitioner()]).to_executorch()
            with open(path, "wb") as stream:
                lowered.write_to_file(stream)
    except Exception as exc:  # its own and torch's share no base class
        raise ExportError(
            f"executorch cannot convert this sampler: {str(exc).strip()[:500]}. Expected operators that it knows; run "
            "the ONNX graph with another runtime."
        ) from exc
    return ()


def partitioner() -> object:
    """Return XNNPACK's partitioner without the GELU that it would compute otherwise."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import GeluConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class ExactGeluConfig(GeluConfig):  # type: ignore[misc]
        def check_constraints(self, node: Any, ep: Any) -> bool:
            exact = node.kwargs.get("approximate", "none") == "none"
            return exact and bool(super().check_constraints(node, ep))

    configs = [ExactGeluConfig if config is GeluConfig else config for config in ALL_PARTITIONER_CONFIGS]
    return XnnpackPartitioner(configs=configs)
