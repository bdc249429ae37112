"""Checks of an ONNX graph before a library reads it: its operators, its size, its inputs and the files it names.

A sampler graph is a flat list of standard ONNX operators, and MatMulNBits of ONNX Runtime, over tensors, with its
weights inside or in listed files next to it. Graphs of bundles are untrusted: control flow and functions may not
terminate, and operators of other domains may load files or code. All of these are refused. Every graph that ``export``
writes passes these checks.

The onnx package is not installed where graphs only run, so this module parses the wire format of protocol buffers as
far as the checks need it: https://protobuf.dev/programming-guides/encoding and onnx.proto of ONNX. Weights are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NoReturn

from .._util.files import check_relative, open_regular, unreadable
from ..errors import BundleError, IntegrityError, printable
from ..spec import SamplerSpec, TensorSpec

MAX_NODES = 2**18
"""Maximum number of nodes and of stored tensors. A U-Net has hundreds per step, SANA-Sprint thousands."""
MAX_OPSET = 64
"""Highest operator set version. ``export`` writes 20; the newest of ONNX is below 30."""
MAX_FIELDS = 2**22
"""Maximum number of fields read from a graph. A node has about 20."""
SIZE_BY_VALUE = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression"})
"""Operators with value-dependent output sizes."""
_CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
_NO_NUMBERS = {
    "SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength",
    "SplitToSequence", "ConcatFromSequence", "Optional", "OptionalHasElement", "OptionalGetElement", "StringConcat",
    "StringSplit", "StringNormalizer", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder",
}  # fmt: skip
_FOREIGN = SIZE_BY_VALUE | _CONTROL_FLOW | _NO_NUMBERS
"""Standard operators that are not allowed in a sampler graph."""
_CONTRIBUTED = {("com.microsoft", "MatMulNBits")}
"""Operators of other domains that are allowed: a product by weights of 4 or 8 bits, which only ONNX Runtime has."""
_DTYPES = {1: "float32", 7: "int64"}
_LONGEST_NUMBER = 10
"""Bytes of the longest varint."""
_WINDOW = 8192
"""Bytes that are read at once."""
_EXTERNAL_KEYS = {b"location", b"offset", b"length", b"checksum"}


def check_graph_file(path: Path, listed: Mapping[str, int], spec: SamplerSpec | None = None) -> None:
    """Refuse a graph that is not a flat list of standard operators, or that names an unlisted file.

    Args:
        path: The graph.
        listed: Size in bytes of each hashed file in the same folder, by name.
        spec: Expected inputs and output; None accepts any float32 and int64 tensors.

    Raises:
        BundleError: If the graph holds something that is not allowed; the message names it.
        IntegrityError: If it is not an ONNX graph, or its inputs and output differ from ``spec``.
    """
    try:
        with open_regular(path) as stream:
            found = _Reader(path, stream, listed).read()
    except OSError as exc:
        raise unreadable(path, exc) from exc
    if spec is None:
        return
    output = TensorSpec(name=spec.output_name, shape=spec.image_shape)
    expected = [f"{t.name}: {t.dtype} {['batch', *t.shape]}" for t in (*spec.inputs, output)]
    if found != expected:
        raise IntegrityError(
            f"{path} has inputs and output {', '.join(found)}; expected {', '.join(expected)} from the manifest. The "
            "two are of different exports: export the bundle again."
        )


# Field number and wire type in one byte. A field with another wire type is a different field.
_NUMBER, _BYTES = 0, 2
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTION = 7 << 3 | _BYTES, 20 << 3 | _BYTES, 25 << 3 | _BYTES
_MODEL_OPSET, _MODEL_METADATA = 8 << 3 | _BYTES, 14 << 3 | _BYTES
_OPSET_DOMAIN, _OPSET_VERSION = 1 << 3 | _BYTES, 2 << 3 | _NUMBER
_GRAPH_NODE, _GRAPH_TENSOR, _GRAPH_SPARSE = 1 << 3 | _BYTES, 5 << 3 | _BYTES, 15 << 3 | _BYTES
_GRAPH_INPUT, _GRAPH_OUTPUT = 11 << 3 | _BYTES, 12 << 3 | _BYTES
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME = 1 << 3 | _BYTES, 2 << 3 | _BYTES, 3 << 3 | _BYTES
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4 << 3 | _BYTES, 5 << 3 | _BYTES, 7 << 3 | _BYTES
_ATTRIBUTE_NAME, _TENSOR_NAME = 1 << 3 | _BYTES, 8 << 3 | _BYTES
_ATTRIBUTE_TENSORS = {5 << 3 | _BYTES, 10 << 3 | _BYTES}
_ATTRIBUTE_GRAPHS = {6 << 3 | _BYTES, 11 << 3 | _BYTES}
_ATTRIBUTE_SPARSE = {22 << 3 | _BYTES, 23 << 3 | _BYTES}
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13 << 3 | _BYTES, 14 << 3 | _NUMBER
_PAIR_KEY, _PAIR_VALUE = 1 << 3 | _BYTES, 2 << 3 | _BYTES
_VALUE_NAME, _VALUE_TYPE = 1 << 3 | _BYTES, 2 << 3 | _BYTES
_TYPE_TENSOR, _TYPE_DENOTATION = 1 << 3 | _BYTES, 6 << 3 | _BYTES
_TENSOR_DTYPE, _TENSOR_SHAPE = 1 << 3 | _NUMBER, 2 << 3 | _BYTES
_SHAPE_AXIS = 1 << 3 | _BYTES
_AXIS_SIZE, _AXIS_NAME = 1 << 3 | _NUMBER, 2 << 3 | _BYTES


class _Reader:
    """Parses one graph and refuses it at the first violation.

    It reads through a window of its own, since thousands of calls of a stream took longer than creating the session of
    a small graph. The file is not mapped into memory: a file that gets shorter meanwhile would end the process.
    """

    def __init__(self, path: Path, stream: BinaryIO, listed: Mapping[str, int]) -> None:
        self._path, self._stream, self._listed = path, stream, listed
        self._at = self._start = 0  # the next byte, and the first byte of the window
        self._window = b""
        self._fields_left = MAX_FIELDS
        self._nodes = self._tensors = 0
        self._made: set[str] = set()

    def read(self) -> list[str]:
        """Return name, dtype and shape of each input, then of each output."""
        graphs = opsets = 0
        inputs: list[str] = []
        outputs: list[str] = []
        for tag, end in self._fields(os.fstat(self._stream.fileno()).st_size):
            if tag == _MODEL_GRAPH:
                graphs += 1
                self._read_graph(end, inputs, outputs)
            elif tag in (_MODEL_FUNCTION, _MODEL_TRAINING):
                self._refuse("functions" if tag == _MODEL_FUNCTION else "a training graph")
            elif tag == _MODEL_OPSET:
                opsets += self._read_opset(end)
            elif tag == _MODEL_METADATA:
                for _, stop in self._fields(end):
                    self._text(stop)
        if graphs != 1 or opsets != 1:
            raise self._malformed(f"it holds {graphs} graphs and {opsets} versions of ONNX's operators")
        return inputs + outputs

    def _read_opset(self, end: int) -> bool:
        """Check the version of an operator set; return whether it is the standard ONNX domain."""
        domain, version = "", 0
        for tag, stop in self._fields(end):
            domain = self._text(stop) if tag == _OPSET_DOMAIN else domain
            version = stop if tag == _OPSET_VERSION else version
        if not 1 <= version <= MAX_OPSET:
            self._refuse(f"version {version} of the operators {domain or 'ai.onnx'!r}")
        return domain in ("", "ai.onnx")

    def _read_graph(self, end: int, inputs: list[str], outputs: list[str]) -> None:
        self._made.clear()
        for tag, stop in self._fields(end):
            if tag == _GRAPH_NODE:
                self._nodes += 1
                self._read_node(stop)
            elif tag == _GRAPH_TENSOR:
                self._tensors += 1
                self._read_tensor(stop, inline=False)
            elif tag in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                (inputs if tag == _GRAPH_INPUT else outputs).append(self._read_value(stop))
            elif tag == _GRAPH_SPARSE:
                self._refuse("sparse weights")
            if max(self._nodes, self._tensors) > MAX_NODES:
                self._refuse(f"more than {MAX_NODES} nodes or stored tensors")

    def _read_node(self, end: int) -> None:
        operator = domain = ""
        subgraph = False
        for tag, stop in self._fields(end):
            if tag == _NODE_OPERATOR:
                operator = self._text(stop)
            elif tag == _NODE_DOMAIN:
                domain = self._text(stop)
            elif tag in (_NODE_INPUT, _NODE_NAME):
                self._text(stop)
            elif tag == _NODE_OUTPUT:
                name = self._text(stop)
                if name and name in self._made:
                    self._refuse(f"two operators that make {name[:60]!r}")
                self._made.add(name)
            elif tag == _NODE_ATTRIBUTE:
                for part, part_end in self._fields(stop):
                    if part == _ATTRIBUTE_NAME:
                        self._text(part_end)
                    subgraph = subgraph or part in _ATTRIBUTE_GRAPHS
                    if part in _ATTRIBUTE_TENSORS:
                        self._read_tensor(part_end, inline=True)
                    elif part in _ATTRIBUTE_SPARSE:
                        self._refuse("a sparse constant")
        if domain not in ("", "ai.onnx") and (domain, operator) not in _CONTRIBUTED:
            self._refuse(f"the operator {domain[:60]}::{operator[:60]}")
        if subgraph or operator in _FOREIGN:
            self._refuse(f"the operator {operator[:60]}{' with a subgraph' * subgraph}")

    def _read_tensor(self, end: int, *, inline: bool) -> None:
        """Check the location of a tensor's data. ``inline``: it must be inside the graph, as for attributes."""
        external = False
        pairs: dict[bytes, bytes] = {}
        for tag, stop in self._fields(end):
            if tag == _TENSOR_NAME:
                self._text(stop)
            elif tag == _TENSOR_LOCATION:
                external = external or stop != 0
            elif tag == _TENSOR_EXTERNAL:
                external = True
                parts = {part: self._bytes(part_end) for part, part_end in self._fields(stop)}
                key = parts.get(_PAIR_KEY, b"")
                if key in pairs or key not in _EXTERNAL_KEYS:
                    self._refuse(f"external data with the key {key[:60]!r}, twice or unknown")
                pairs[key] = parts.get(_PAIR_VALUE, b"")
        if external:
            if inline:
                self._refuse("an attribute whose numbers are in another file")
            self._check_external(pairs)

    def _check_external(self, pairs: Mapping[bytes, bytes]) -> None:
        name = pairs.get(b"location", b"").decode("utf-8", "replace")
        size = self._listed.get(name)
        # ONNX Runtime and OpenVINO interpret this name as a memory address.
        if size is None or "/" in name or "_ORT_MEM_ADDR_" in name:
            self._refuse(f"weights in {name[:200]!r}, which is no listed file next to it")
        check_relative(name)
        offset, length = pairs.get(b"offset", b"0"), pairs.get(b"length", b"0")
        if not all(number.isdigit() and len(number) < 20 for number in (offset, length)):
            raise self._malformed(f"weights at offset {offset[:40]!r} of length {length[:40]!r}")
        if int(offset) + int(length) > size:
            raise self._malformed(f"weights up to byte {int(offset) + int(length)} of {name}, which has {size}")

    def _read_value(self, end: int) -> str:
        """Return name, dtype and shape of an input or output as a text."""
        name, dtypes, shapes = "", [], []
        for tag, stop in self._fields(end):
            if tag == _VALUE_NAME:
                name = self._text(stop)
            elif tag == _VALUE_TYPE:
                for kind, kind_end in self._fields(stop):
                    if kind not in (_TYPE_TENSOR, _TYPE_DENOTATION):
                        dtypes.append("no tensor")
                    for part, value in self._fields(kind_end) if kind == _TYPE_TENSOR else ():
                        if part == _TENSOR_DTYPE:
                            dtypes.append(_DTYPES.get(value, f"type {value}"))
                        elif part == _TENSOR_SHAPE:
                            shapes.append(self._read_shape(value))
        if len(dtypes) != 1 or len(shapes) != 1 or dtypes[0] not in _DTYPES.values():
            found = f"{' '.join(dtypes) or 'no tensor'} of {len(shapes) or 'no'} shape"
            self._refuse(f"the input or output {name[:60]!r}: {found}")
        return f"{name}: {dtypes[0]} {shapes[0]}"

    def _read_shape(self, end: int) -> list[int | str]:
        """Return the axis sizes; ``batch`` for a dynamic first axis."""
        axes: list[int | str] = []
        for tag, stop in self._fields(end):
            if tag == _SHAPE_AXIS:
                axis: int | str = "?"
                for part, value in self._fields(stop):
                    axis = value if part == _AXIS_SIZE else axis
                    if part == _AXIS_NAME:
                        self._text(value)
                        axis = "?"
                axes.append(axis if axes or axis != "?" else "batch")
        return axes

    def _fields(self, end: int) -> Iterator[tuple[int, int]]:
        """Yield tag and value of each field of the message that ends at ``end``.

        For text, bytes and messages the value is their end offset, and the next byte is their first.
        """
        while (at := self._at) < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                self._refuse(f"more than {MAX_FIELDS} fields")
            tag = self._number()
            kind = tag & 7
            if kind == _NUMBER:
                yield tag, self._number()
                continue
            size = self._number() if kind == _BYTES else {1: 8, 5: 4}.get(kind, -1)
            stop = self._at + size
            if size < 0 or tag < 8 or stop > end:
                raise self._malformed(f"the field at byte {at} does not end where it should")
            yield tag, stop
            self._at = stop
        if self._at != end:
            raise self._malformed(f"a field extends beyond byte {end}")

    def _number(self) -> int:
        """Read a varint."""
        at, number = self._at - self._start, 0
        if 0 <= at < len(self._window) and (only := self._window[at]) < 128:  # as nearly all are
            self._at += 1
            return only
        for index, byte in enumerate(self._bytes(self._at + _LONGEST_NUMBER)):
            number |= (byte & 127) << 7 * index
            if byte < 128:
                self._at += index + 1
                return number
        raise self._malformed(f"no number ends at byte {self._at}")

    def _bytes(self, end: int) -> bytes:
        """Return the bytes up to ``end``, fewer at the end of the file; the next byte stays."""
        first, last = self._at - self._start, end - self._start
        if first < 0 or last > len(self._window):
            self._stream.seek(self._at)
            self._window = self._stream.read(max(_WINDOW, end - self._at))
            self._start, first, last = self._at, 0, end - self._at
        return self._window[first:last]

    def _text(self, end: int) -> str:
        """Read a name, which may appear in messages of libraries."""
        data = self._bytes(end)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise self._malformed(f"the name {data[:60]!r} is no UTF-8") from None
        if not (text.isascii() and text.isprintable()) and text != printable(text):
            raise self._malformed(f"the name {text[:60]!r} holds what commands a terminal")
        return text

    def _refuse(self, what: str) -> NoReturn:
        raise BundleError(
            f"{self._path} holds {what}, expected a flat graph of standard ONNX operators with its weights inside or "
            "in listed files next to it. Do not use it unless you trust who made it; export the model again."
        )

    def _malformed(self, what: str) -> IntegrityError:
        return IntegrityError(f"{self._path} is no ONNX graph: {what}. Export it again.")
