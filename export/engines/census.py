"""Count the fused kernels of an engine and compare them with its graph.

With detailed logging the builder prints one line per fused kernel, with its types and ONNX nodes. TensorRT's engine
inspector prints the same in its one-line format. The lines give the type of each layer (convolution or matrix product
with stored weights) and whether attention is one kernel; the graph defines the expected types.

TensorRT-RTX writes ``LayerType: correlation``, ``Datatype: Half`` and ``Constants: [...]``; TensorRT
``LayerType: CaskConvolution``, ``Format/Datatype: Channel major FP16 format`` and ``Weights: {"Type": "Half"}``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from ..precision.half import conditioning_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

_LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<rest>.*)")
_TYPE = re.compile(r"Datatype: ([^,}\]]+)")
_WEIGHTS = re.compile(r'Weights: \{"Type": "(\w+)"')
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_COMPUTES = re.compile(r"corr|conv(?!er)|gemm|matmul|matrixmul|\bfc", re.IGNORECASE)
"""Kinds of kernels that compute a layer, for example ``CaskConvolution`` and ``CaskGemmMatrixMultiply``."""
_FUSED = re.compile(r"__myl_(?:[A-Z][a-z]+)*?(?:Corr|Conv|Fc)(?=[A-Z_])")
"""Names of fused kernels that do; a convolution of 1x1 may become a plain matrix product (``__myl_Fc...``, marked
``__gemm_from_conv1x1``), and one of int8 may be converted first (``__myl_CastMulFc``)."""
_UNROLLED = re.compile(r"__myl_\w*?(Slic)+(Mul)+(Add)+")
"""Names of kernels that compute a layer of few channels (4 observed) as sums of products."""
_WORDS = {
    "Float": "float|fp32|float32", "Half": "half|fp16|float16", "BFloat16": "bfloat16|bf16|bfp16", "Int8": "int8",
    "FP8": "fp8|e4m3|fp8_e4m3|float8",
}  # fmt: skip
_SPELLINGS = {name: re.compile(rf"\b({words})\b", re.IGNORECASE) for name, words in _WORDS.items()}
NOT_FOUND = "not found"
_NAMES = {"FLOAT": "Float", "FLOAT16": "Half", "BFLOAT16": "BFloat16"}
_REDUCED = ("Half", "BFloat16")
_EIGHT_BITS = ("Int8", "FP8")
_KINDS = {"Conv": "convolutions", "MatMul": "products", "Gemm": "products"}
_WORDS_FOR = {"convolutions": "convolutions", "products": "matrix products"}


class Census(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The kernels of an engine, or the plan of a graph.

    Attributes:
        convolutions: Number of convolutions of the graph by type.
        products: Number of matrix products with stored weights by type; without those that do not depend on the noise,
            which builders merge and fold.
        attention: Number of attention blocks, softmax between two matrix products.
        attention_fused: Number of attention blocks that are one kernel.
        kernels: Fused kernels by ``<kind>:<type>``; empty for a plan.
        odd: Layers whose type differs from the graph, as ``<node>: <type>``.
        unseen: Layers that no kernel names.
    """

    convolutions: dict[str, int]
    attention: int
    attention_fused: int
    products: dict[str, int] = {}
    kernels: dict[str, int] = {}
    odd: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [part for kind, name in _WORDS_FOR.items() for part in _counted(getattr(self, kind), name)]
        if self.attention:
            every = "all" if self.attention_fused == self.attention else f"{self.attention_fused} of"
            parts.append(f"{every} {self.attention} attention blocks fused")
        layers = [name for kind, name in _WORDS_FOR.items() if getattr(self, kind)]
        if layers and not any("Float" in getattr(self, kind) for kind in _WORDS_FOR):
            parts.append(f"0 {' or '.join(layers)} Float")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One fused kernel.

    Attributes:
        name: Name of the kernel.
        kind: ``LayerType`` of the kernel.
        input_types: Types of its inputs, in order.
        constant_types: Types of its weights, in order.
        nodes: The ONNX nodes in it.
    """

    name: str
    kind: str
    input_types: tuple[str, ...]
    constant_types: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def computes_layer(self) -> bool:
        """Whether the kernel computes a layer, not only converts its data."""
        return bool(_COMPUTES.search(self.kind) or _FUSED.match(self.name))

    @property
    def type(self) -> str:
        """Int8 or FP8 if both data and weights have it, else the type of weights that data has; else the first other.

        A kernel with int8 data and half weights converts the data and multiplies in half precision. One that also adds
        a float32 residual has an input of that type, which may come first.
        """
        for low in (*_EIGHT_BITS, *self.constant_types):
            if low in self.input_types and low in self.constant_types:
                return low
        types = self.input_types + self.constant_types
        return next((name for name in types if name not in _EIGHT_BITS), types[0] if types else "none")


def parse_kernels(lines: Iterable[str]) -> list[Kernel]:
    """Parse the kernels of a build log or of the engine inspector's one-line format."""
    return list(_kernels(lines))


def _kernels(lines: Iterable[str]) -> Iterator[Kernel]:
    for text in lines:
        for line in text.split("\n"):  # not splitlines, because U+001E separates the nodes of a kernel
            if match := _LINE.search(line):
                rest = match["rest"]
                before_outputs, _, after = rest.partition("], Outputs:")
                inputs, _, constants = before_outputs.partition("], Constants: [")
                yield Kernel(
                    name=match["name"],
                    kind=match["kind"],
                    input_types=tuple(map(_type_named, _TYPE.findall(inputs))),
                    constant_types=tuple(map(_type_named, _TYPE.findall(constants) + _WEIGHTS.findall(after))),
                    nodes=tuple(_NODE.findall(rest)),
                )


def _type_named(text: str) -> str:
    """Return the type in the description of a format; its first word if none is known."""
    return next((name for name, spelling in _SPELLINGS.items() if spelling.search(text)), text.split()[0])


def planned_census(model: ir.Model, *, batch_one: bool = False) -> tuple[Census, dict[str, str], tuple[str, ...]]:
    """Return the plan of a graph, with the type of each layer and the softmax of each attention block.

    Args:
        model: The graph.
        batch_one: Whether the engine accepts only batches of one.
    """
    free = conditioning_nodes(model.graph)
    types = {
        node.name or "": _planned_type(node)
        for node in model.graph
        if node.op_type == "Conv" or (node.op_type in _KINDS and _has_weights(node) and node not in free)
    }
    softmaxes = {node.name or "": node for node in model.graph if _is_attention(node)}
    low = sum(_NAMES.get(_dtype(node), "") in _REDUCED and _fusible(node, batch_one) for node in softmaxes.values())
    planned = Census(**_by_kind(model, types), attention=len(softmaxes), attention_fused=low)
    return planned, types, tuple(softmaxes)


def take_census(model: ir.Model, lines: Iterable[str]) -> Census | None:
    """Count the kernels of an engine by the layers of its graph.

    Args:
        model: The graph.
        lines: The build log, or the text of the inspector.

    Returns:
        The census; None if no kernel is named.
    """
    kernels = parse_kernels(lines)
    if not kernels:
        return None
    _, types, softmaxes = planned_census(model)
    built: dict[str, set[str]] = {name: set() for name in types}
    for kernel in kernels:
        if kernel.computes_layer:
            for node in kernel.nodes:
                if node in built:
                    built[node].add(kernel.type)
    for kernel in kernels:
        if _UNROLLED.match(kernel.name):
            for node in kernel.nodes:
                if built.get(node) == set():  # if no other kernel computes it
                    built[node] = {kernel.type}
    found = {name: "+".join(sorted(kinds)) or NOT_FOUND for name, kinds in built.items()}
    fused = {node for kernel in kernels if "mha" in kernel.name for node in kernel.nodes}
    return Census(
        **_by_kind(model, found),
        attention=len(softmaxes),
        attention_fused=sum(name in fused for name in softmaxes),
        kernels=dict(sorted(Counter(f"{k.kind}:{k.type}" + ":mha" * ("mha" in k.name) for k in kernels).items())),
        odd=tuple(
            f"{name}: {found[name]}, not {types[name]}" for name in types if found[name] not in (types[name], NOT_FOUND)
        ),
        unseen=tuple(name for name in types if found[name] == NOT_FOUND),
    )


def mismatches(planned: Census, built: Census) -> list[str]:
    """Return the differences of an engine from its graph; empty if there are none."""
    return [f"{len(built.odd)} layers run in another type ({_some(built.odd)})"] if built.odd else []


def doubts(planned: Census, built: Census) -> list[str]:
    """Return the parts that the kernel names do not show: layers and attention blocks without a kernel.

    TensorRT-RTX names all of them (measured), so there they count as mismatches. For TensorRT they are warnings.
    """
    found = []
    if built.unseen:
        found.append(f"{len(built.unseen)} layers are named by no kernel ({_some(built.unseen)})")
    if built.attention_fused < planned.attention_fused:
        found.append(f"{built.attention_fused} of {planned.attention_fused} attention blocks are one kernel")
    return found


def _counted(types: dict[str, int], name: str) -> list[str]:
    """Return ``["62 of 66 <name> Int8", "4 Half"]``."""
    counts = Counter(types).most_common()
    return [
        f"{n} of {sum(types.values())} {name} {kind}" if not i else f"{n} {kind}" for i, (kind, n) in enumerate(counts)
    ]


def _by_kind(model: ir.Model, types: Mapping[str, str]) -> dict[str, Any]:
    """Return the number of layers of each kind by type."""
    kinds = {node.name or "": _KINDS[node.op_type] for node in model.graph if node.name in types}
    return {kind: dict(Counter(t for name, t in types.items() if kinds[name] == kind)) for kind in _WORDS_FOR}


def _has_weights(node: ir.Node) -> bool:
    """Return whether the second factor of a matrix product is stored and the first is not, ignoring quantization."""
    stored = []
    for value in node.inputs[:2]:
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "DequantizeLinear":
            value = producer.inputs[0]
        stored.append(value is not None and value.is_initializer())
    return stored == [False, True]


def _some(texts: tuple[str, ...]) -> str:
    return "; ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def _planned_type(node: ir.Node) -> str:
    producers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    if all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers):
        codes: Any = producers[0].inputs[0]  # type: ignore[union-attr]
        return "FP8" if "FLOAT8" in str(codes.dtype) else "Int8"
    return _NAMES.get(_dtype(node), _dtype(node))


def _dtype(node: ir.Node) -> str:
    dtype = node.outputs[0].dtype
    return dtype.name if dtype is not None else ""


def _fusible(softmax: ir.Node, batch_one: bool) -> bool:
    """Return whether the builder has a fused kernel for this head size.

    Multiples of 8 from 16 to 256 were observed; 4 and 8 were not. One head of one sample is two plain matrix products,
    which were never fused.
    """
    before = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    while before is not None and before.op_type != "MatMul":  # skip the scale and the mask
        before = before.inputs[0].producer() if before.inputs[0] is not None else None
    queries = before.inputs[0] if before is not None else None
    shape = queries.shape if queries is not None else None
    size = shape[-1] if shape is not None else None
    if batch_one and shape is not None and all(n == 1 for n in shape[1:-2]):
        return False
    return isinstance(size, int) and size % 8 == 0 and 16 <= size <= 256


def _is_attention(node: ir.Node) -> bool:
    """Return whether a softmax is between two matrix products, ignoring quantization."""
    if node.op_type != "Softmax" or node.inputs[0] is None:
        return False
    before = node.inputs[0].producer()
    after = {reader.op_type for reader in node.outputs[0].consumers()}
    return before is not None and before.op_type in ("MatMul", "Mul", "Add") and bool(after & {"MatMul", "Transpose"})
