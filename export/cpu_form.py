"""The float32 sampler as CPUs run it fastest: the same numbers but for rounding, other operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scm_sdk.errors import UnsupportedGraphError

from .fused_norms import norms_that_fuse
from .passes import drop_unused
from .precision import PRECISION_KEY
from .winograd import products_for_convolutions

if TYPE_CHECKING:
    import onnx_ir as ir


def cpu_form(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """Return the ``fp32-cpu`` form of a sampler graph, and a line for each thing that was rewritten.

    Args:
        model: What ``compose_sampler`` made or ``read_model`` read, float32; it is not changed.

    Raises:
        UnsupportedGraphError: If there is nothing to rewrite.
    """
    copy = model.clone()
    convolutions, of = products_for_convolutions(copy)
    norms = norms_that_fuse(copy)
    if not convolutions and not norms:
        raise UnsupportedGraphError(
            f"none of the {of} convolutions gains as Winograd's products and no norm is over a last axis, expected one "
            "or the other: 3x3 convolutions of 256 channels over 16x16, 128 over 32x32 or 192 over 64x64, or a "
            "transformer. Run the fp32 graph."
        )
    drop_unused(copy)  # the factors of norms that were rewritten
    copy.metadata_props[PRECISION_KEY] = "fp32-cpu"
    notes = []
    if convolutions:
        notes.append(f"{convolutions} of {of} convolutions as Winograd's products")
    if norms:
        notes.append(f"{norms} norms as one kernel each")
    return copy, tuple(notes)
