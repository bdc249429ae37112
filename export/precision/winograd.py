"""3x3 convolutions as Winograd products F(4x4, 3x3) in standard ONNX operators.

Each tile of 4x4 outputs is computed from 6x6 inputs (Lavin & Gray 2015, arXiv 1509.09308):

    Y = A^T [(G w G^T) * (B^T d B)] A

summed over the input channels, which turns the elementwise product into 36 matrix products. B^T and A^T are built for
all tiles of a map, including padding: one matrix for its rows and one for its columns. Their cost grows with the
channels and that of the products with their square, so only wide layers are rewritten. CPU libraries compute such
convolutions directly at the speed of a matrix product, which only fewer operations can improve.

The graph stores the original filters under their names; they become 4 times as large when it is loaded.
"""

from __future__ import annotations

import logging
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..graph.ops import put_before, stored

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

LEAST_CHANNELS, LEAST_TILES, LEAST_PRODUCT = 128, 16, 2**12
"""Minimum channels of the narrower side, tiles of a map, and their product: with few channels the transforms cost more
than they save, with few tiles the larger filters do. Measured by ``benchmarks/speed/winograd.py``."""
CHANNELS_PER_SIDE = 3
"""Minimum channels per row or column of a map, because the matrix for all tiles of an axis grows with its square."""
_OUT, _IN = 4, 6
_B_T = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_G = np.array(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
     [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)  # fmt: skip
_A_T = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def products_for_convolutions(model: ir.Model) -> tuple[int, int]:
    """Rewrite the wide 3x3 convolutions of a float32 graph; return their number and the number of all convolutions.

    Requires: nodes have their names, and inputs of convolutions have their shapes.
    Ensures: the same values up to rounding, about 1e-5 of a layer's largest. Outputs of convolutions and weights keep
    their names.
    """
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    chosen = {node: sizes for node in convolutions if (sizes := _sizes(node)) is not None and sizes.worth_it}
    filters: dict[ir.Value, ir.Value] = {}
    for node in convolutions:
        if node not in chosen:
            logger.debug("winograd: kept %s: too narrow, or no 3x3 convolution that keeps the map's size", node.name)
    logger.debug("winograd: rewrote %d of %d convolutions", len(chosen), len(convolutions))
    for node, sizes in chosen.items():
        _Rewriting(model.graph, node, filters).run(sizes)
    return len(chosen), len(convolutions)


class _Sizes(NamedTuple):
    """Sizes of a 3x3 convolution that keeps the size of its map."""

    out_channels: int
    in_channels: int
    height: int
    width: int

    @property
    def worth_it(self) -> bool:
        tiles, channels = _tiles(self.height) * _tiles(self.width), min(self.out_channels, self.in_channels)
        enough = channels >= LEAST_CHANNELS and tiles >= LEAST_TILES and channels * tiles >= LEAST_PRODUCT
        return enough and channels >= CHANNELS_PER_SIDE * max(self.height, self.width)


def _sizes(node: ir.Node) -> _Sizes | None:
    """Return the sizes of a dense float32 3x3 Conv with a stored weight and same padding; None for others."""
    import onnx_ir as ir

    if node.inputs[0] is None or node.inputs[1] is None or node.inputs[0].dtype != ir.DataType.FLOAT:
        return None
    attributes = node.attributes
    same = (
        attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        and all(n == 1 for key in ("strides", "dilations") for n in attributes.get_ints(key, [1]))
        and list(attributes.get_ints("pads", [0])) == [1] * 4
    )
    weight = node.inputs[1].const_value
    filters = list(weight.shape.numpy()) if weight is not None else []
    size = [d for d in list(node.inputs[0].shape or ())[2:] if isinstance(d, int)]
    if not same or filters[2:] != [3, 3] or len(size) != 2:
        return None
    return _Sizes(*filters[:2], *size)


def _tiles(size: int) -> int:
    return -(-size // _OUT)


def input_transform(size: int) -> np.ndarray:
    """Return B^T for all tiles of an axis, zero-padded at both ends, (6 tiles, size) float32; tiles vary fastest."""
    tiles = _tiles(size)
    whole = np.zeros((_IN, tiles, size), np.float32)
    for tile in range(tiles):
        for j in range(_IN):
            if 0 <= (place := tile * _OUT + j - 1) < size:
                whole[:, tile, place] = _B_T[:, j]
    return whole.reshape(_IN * tiles, size)


def output_transform(size: int) -> np.ndarray:
    """Return A^T for all tiles of an axis, cropped to its size, (size, 6 tiles) float32; tiles vary fastest."""
    tiles = _tiles(size)
    whole = np.zeros((tiles, _OUT, _IN, tiles), np.float32)
    for tile in range(tiles):
        whole[tile, :, :, tile] = _A_T
    return whole.reshape(tiles * _OUT, _IN * tiles)[:size]


def filter_transform() -> np.ndarray:
    """Return the matrix from the 9 values of a filter w to the 36 of G w G^T, (36, 9) float32."""
    return np.kron(_G, _G).astype(np.float32)


class _Rewriting:
    """Replaces one convolution by products."""

    def __init__(self, graph: ir.Graph, conv: ir.Node, filters: dict[ir.Value, ir.Value]) -> None:
        self.graph, self.conv, self.filters = graph, conv, filters
        self.numbers = count(1)

    def run(self, sizes: _Sizes) -> None:
        """Change the graph."""
        out_channels, in_channels, height, width = sizes
        rows, columns = _tiles(height), _tiles(width)
        x, weight, *rest = self.conv.inputs
        # Rows first here and last below, because their many small products are cheaper on the narrower map.
        v = self._op("MatMul", [self._constant(f"input_{height}", input_transform(height)), x])
        v = self._op("MatMul", [v, self._constant(f"input_{width}.T", input_transform(width).T)])
        v = self._op("Reshape", [v, self._shape(0, 0, _IN, rows, _IN, columns)])
        v = self._op("Transpose", [v], perm=[2, 4, 1, 0, 3, 5])
        v = self._op("Reshape", [v, self._shape(_IN * _IN, in_channels, -1)])
        v = self._op("MatMul", [self._filtered(weight, out_channels, in_channels), v])
        v = self._op("Reshape", [v, self._shape(_IN, _IN, out_channels, -1, rows, columns)])
        v = self._op("Transpose", [v], perm=[3, 2, 0, 4, 1, 5])
        v = self._op("Reshape", [v, self._shape(-1, out_channels, _IN * rows, _IN * columns)])
        v = self._op("MatMul", [v, self._constant(f"output_{width}.T", output_transform(width).T)])
        v = self._op("MatMul", [self._constant(f"output_{height}", output_transform(height)), v])
        for bias in (value for value in rest if value is not None):
            v = self._op("Add", [v, self._op("Unsqueeze", [bias, self._shape(1, 2)])])
        self._take_place(v)

    def _filtered(self, weight: ir.Value | None, out_channels: int, in_channels: int) -> ir.Value:
        """Return G w G^T, (36, out, in), once for all steps; from constants, so libraries fold it on loading."""
        assert weight is not None
        if weight not in self.filters:
            w = self._op("Transpose", [weight], perm=[2, 3, 0, 1])  # while the filter is small
            w = self._op("Reshape", [w, self._shape(9, -1)])
            w = self._op("MatMul", [self._constant("filter", filter_transform()), w])
            self.filters[weight] = self._op("Reshape", [w, self._shape(_IN * _IN, out_channels, in_channels)])
        return self.filters[weight]

    def _op(self, op_type: str, inputs: list[ir.Value | None], **attributes: list[int]) -> ir.Value:
        name = f"{self.conv.name}/winograd.{next(self.numbers)}.{op_type}"
        return put_before(self.graph, self.conv, name, op_type, inputs, attributes)

    def _constant(self, what: str, array: np.ndarray) -> ir.Value:
        return stored(self.graph, f"winograd.{what}", np.ascontiguousarray(array))

    def _shape(self, *numbers: int) -> ir.Value:
        name = "winograd.shape_" + "_".join(str(n) for n in numbers)
        return stored(self.graph, name, np.array(numbers, np.int64))

    def _take_place(self, value: ir.Value) -> None:
        """Transfer name, shape and readers of the output to the replacement, and remove the convolution."""
        import onnx_ir as ir

        old = self.conv.outputs[0]
        name, shape = old.name, old.shape
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(self.conv, safe=True)
        value.name, value.shape = name, shape
