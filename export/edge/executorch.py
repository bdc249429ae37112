"""ExecuTorch: the sampler as a ``.pte`` program for phones, lowered to XNNPACK.

A program does not name its inputs: they are in the order of the spec.
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
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    module, feeds = source.sampler()
    sampler: Any = module.sampler
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                sampler, tuple(feeds[tensor.name] for tensor in source.spec.inputs), strict=False
            )
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
            with open(path, "wb") as stream:
                lowered.write_to_file(stream)
    except Exception as exc:  # its own and torch's share no base class
        raise ExportError(
            f"executorch cannot convert this sampler: {str(exc).strip()[:500]}. Expected operators that it knows; run "
            "the ONNX graph with another runtime."
        ) from exc
    return ()
