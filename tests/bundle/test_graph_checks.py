"""Graphs of untrusted bundles: control flow, and files without a hash, are refused before a library sees them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from helpers.toy_bundles import write_linear_graph
from scm_sdk._util.files import sha256_file
from scm_sdk.bundle import graph_checks
from scm_sdk.bundle.graph_checks import check_graph_file
from scm_sdk.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest
from scm_sdk.bundle.verify import seal
from scm_sdk.errors import BundleError, IntegrityError, printable
from scm_sdk.export.cli import main
from scm_sdk.inference.generator import Generator
from scm_sdk.spec import SamplerSpec

SPEC = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4))
GRAPH = "onnx/fp32/1step/model.onnx"
Change = Callable[[onnx.ModelProto], object]


@pytest.fixture
def model(tmp_path: Path) -> onnx.ModelProto:
    write_linear_graph(tmp_path / "linear.onnx", SPEC)
    return onnx.load(tmp_path / "linear.onnx")


def body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    return helper.make_graph(list(nodes) or [helper.make_node("Identity", ["sum"], ["y"])], "body", [], [out])


def node(operator: str, **attributes: Any) -> Change:
    return lambda model: model.graph.node.append(helper.make_node(operator, ["sum"], ["more"], **attributes))


def nested_ifs(model: onnx.ModelProto) -> None:
    graph = body()
    for _ in range(20):
        graph = body(helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph))
        if graph.ByteSize() > 1 << 20:
            break
    node("If", then_branch=graph, else_branch=body())(model)


def doubling_functions(model: onnx.ModelProto) -> None:
    for level in range(30):
        calls = [helper.make_node(f"F{level + 1}", ["x"], [f"y{i}"], domain="f") for i in range(2)]
        add = helper.make_node("Add", ["y0", "y1"], ["y"])
        imports = [helper.make_opsetid("f", 1), helper.make_opsetid("", 20)]
        model.functions.append(helper.make_function("f", f"F{level}", ["x"], ["y"], [*calls, add], imports))


def external(location: str | None, *more: tuple[str, str], declared: bool = True) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        if declared:
            tensor.data_location = TensorProto.EXTERNAL
        for key, value in (*([("location", location)] if location is not None else []), *more):
            tensor.external_data.add(key=key, value=value)

    return change


def external_attribute(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32))
    onnx.external_data_helper.set_external_data(tensor, "model.onnx_data", 0, 16)
    tensor.ClearField("raw_data")
    model.graph.node.append(helper.make_node("Constant", [], ["more"], value=tensor))


def first_input(kind: onnx.TypeProto | None) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].ClearField("type")
        if kind is not None:
            model.graph.input[0].type.CopyFrom(kind)

    return change


FLOATS = helper.make_tensor_type_proto(TensorProto.FLOAT, ["batch", 3, 4, 4])
REFUSED: dict[str, tuple[Change, str]] = {
    "loop": (node("Loop", body=body()), "the operator Loop"),
    "if": (node("If", then_branch=body(), else_branch=body()), "the operator If"),
    "nested_ifs": (nested_ifs, "the operator If"),
    "scan": (node("Scan", body=body(), num_scan_inputs=1), "the operator Scan"),
    "map": (node("SequenceMap", body=body()), "the operator SequenceMap"),
    "subgraph": (node("Relu", body=body()), "the operator Relu with a subgraph"),
    "subgraphs": (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("x", [body()])), "with a subgraph"),
    "nonzero": (node("NonZero"), "the operator NonZero"),
    "foreign": (node("EPContext", domain="com.microsoft"), "the operator com.microsoft::EPContext"),
    "foreign relative": (node("MatMulNBits", domain="com.other"), "the operator com.other::MatMulNBits"),
    "functions": (doubling_functions, "holds functions"),
    "training": (lambda m: m.training_info.add(), "holds a training graph"),
    "sparse": (lambda m: m.graph.sparse_initializer.add(), "holds sparse weights"),
    "unlisted": (external("w.bin"), "weights in 'w.bin'"),
    "undeclared": (external("w.bin", declared=False), "weights in 'w.bin'"),
    "nowhere": (external(None), "weights in ''"),
    "above": (external("../w.bin"), r"weights in '\.\./w.bin'"),
    "below": (external("sub/w.bin"), "weights in 'sub/w.bin'"),
    "absolute": (external("/etc/passwd"), "weights in '/etc/passwd'"),
    "address": (external("*/_ORT_MEM_ADDR_/*", ("offset", "4096")), r"weights in '\*/_ORT_MEM_ADDR_/\*'"),
    "address_name": (external("_ORT_MEM_ADDR_"), "weights in '_ORT_MEM_ADDR_'"),
    "two_places": (external("model.onnx_data", ("location", "w.bin")), "key b'location', twice"),
    "other_key": (external("model.onnx_data", ("basepath", "/")), "key b'basepath', twice or unknown"),
    "beyond": (external("model.onnx_data", ("offset", "60"), ("length", "5")), "byte 65 of model.onnx_data, .* 64"),
    "negative": (external("model.onnx_data", ("offset", "-4")), "at offset b'-4'"),
    "huge": (external("model.onnx_data", ("length", "9" * 5000)), "of length b'9999"),
    "attribute": (external_attribute, "an attribute whose numbers are in another file"),
    "no_type": (first_input(None), "the input or output 'noise_0': no tensor"),
    "sequence": (first_input(helper.make_sequence_type_proto(FLOATS)), "the input or output 'noise_0': no tensor"),
    "no_shape": (first_input(helper.make_tensor_type_proto(TensorProto.FLOAT, None)), "'noise_0': float32 of no shape"),
    "float64": (first_input(helper.make_tensor_type_proto(TensorProto.DOUBLE, ["batch", 3])), "'noise_0': type 11"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_sampler_graph_holds_is_refused(case: str, model: onnx.ModelProto, tmp_path: Path) -> None:
    change, match = REFUSED[case]
    change(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    listed = {"model.onnx_data": 64, "_ORT_MEM_ADDR_": 64, "sub/w.bin": 64, "../w.bin": 64, "/etc/passwd": 64}
    with pytest.raises(BundleError, match=match):
        check_graph_file(tmp_path / "model.onnx", listed)


@pytest.mark.parametrize(
    "shape, dtype",
    [(["batch", 3, 4, 5], "FLOAT"), ([2, 3, 4, 4], "FLOAT"), (["batch", 3, 4, "w"], "FLOAT"), ([], "FLOAT"),
     (["batch", 3, 4, 4], "INT64")],
)  # fmt: skip
def test_inputs_are_those_of_the_sampler(shape: list[Any], dtype: str, model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    check_graph_file(path, {}, SPEC)
    first_input(helper.make_tensor_type_proto(getattr(TensorProto, dtype), shape))(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match=r"expected noise_0: float32 \['batch', 3, 4, 4\]"):
        check_graph_file(path, {}, SPEC)


def test_no_library_sees_a_refused_graph(linear_bundle: Callable[..., Path]) -> None:
    """A sealed bundle of a hostile maker: opened, opened without hashing, verified."""
    path = linear_bundle(SPEC)
    model = onnx.load(path / GRAPH)
    external("w.bin")(model)
    forge(path, model)
    (path / "onnx/fp32/1step/w.bin").write_bytes(np.float32(0.5).tobytes())
    for backend in ("onnxruntime", "openvino"):
        for verify in ("digest", "none"):
            with pytest.raises(BundleError, match=r"weights in 'w.bin', which is no listed file"):
                Generator.from_pretrained(path, backend=backend, verify=verify)
    done = CliRunner().invoke(main, ["bundle", "verify", str(path)])
    assert done.exit_code == 6 and "w.bin" in done.stderr


def test_weights_in_a_listed_file_are_read(linear_bundle: Callable[..., Path]) -> None:
    path = linear_bundle(SPEC)
    with Generator.from_pretrained(path, backend="onnxruntime") as gen:
        expected = gen(2, seed=1, output_type="raw").images
    model = onnx.load(path / GRAPH)
    external("w.bin", ("offset", "0"), ("length", "4"))(model)
    (path / "onnx/fp32/1step/w.bin").write_bytes(np.float32(0.5).tobytes())
    forge(path, model, "onnx/fp32/1step/w.bin")
    with Generator.from_pretrained(path, backend="onnxruntime") as gen:
        np.testing.assert_array_equal(gen(2, seed=1, output_type="raw").images, expected)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda data: b"", "it holds 0 graphs"),
        (lambda data: data * 2, "it holds 2 graphs"),
        (lambda data: data[:-9], "is no ONNX graph"),
        (lambda data: b"graph" * 20, "is no ONNX graph"),
        (lambda data: data + b"\x0b\x0c", "field at byte .* does not end"),
        (lambda data: data + b"\xff" * 20, "no number ends at byte"),
        (lambda data: data + b"\x3a\xff\xff\xff\xff\x07", "field at byte .* does not end"),
    ],
)
def test_other_bytes_are_refused(
    change: Callable[[bytes], bytes], match: str, model: onnx.ModelProto, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(change(model.SerializeToString()))
    with pytest.raises(IntegrityError, match=match):
        check_graph_file(tmp_path / "model.onnx", {})
    with pytest.raises(IntegrityError, match="Not a plain file"):
        check_graph_file(tmp_path, {})


def opset(version: int, domain: str = "") -> Change:
    return lambda model: model.opset_import.append(helper.make_opsetid(domain, version))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda model: model.graph.node[0].input.append("\x1b[2J"),
            r"the name '\\x1b\[2J' holds what commands a terminal",
        ),
        (lambda model: model.metadata_props.add(key="a", value="\u202e"), "holds what commands a terminal"),
        (lambda model: model.graph.node.append(model.graph.node[0]), "two operators that make 'sum'"),
        (lambda model: model.opset_import.pop(), "1 graphs and 0 versions"),
        (opset(1), "1 graphs and 2 versions"),
        (opset(2**62, "x"), f"version {2**62} of the operators 'x'"),
    ],
)
def test_names_are_text_and_versions_known(change: Change, match: str, model: onnx.ModelProto, tmp_path: Path) -> None:
    change(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=match):
        check_graph_file(tmp_path / "model.onnx", {})


def test_names_that_are_no_utf8_reach_no_library(model: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString().replace(b"scaled", b"scal\xff\xfe"))
    with pytest.raises(IntegrityError, match=r"the name b'scal\\xff\\xfe' is no UTF-8"):
        check_graph_file(tmp_path / "model.onnx", {})


def test_sizes_have_limits(model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    monkeypatch.setattr(graph_checks, "MAX_NODES", 4)
    check_graph_file(path, {})  # 3 nodes, 4 stored tensors
    for more in "de":
        model.graph.node.append(helper.make_node("Neg", ["sum"], [more]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="more than 4 nodes or stored tensors"):
        check_graph_file(path, {})
    monkeypatch.setattr(graph_checks, "MAX_FIELDS", 20)
    with pytest.raises(BundleError, match="more than 20 fields"):
        check_graph_file(path, {})


def is_allowed(model: onnx.ModelProto, listed: dict[str, int]) -> bool:
    """Say what onnx's own reader finds."""
    graph = model.graph
    attributes = [attribute for each in graph.node for attribute in each.attribute]
    inline = [attribute.t for attribute in attributes if attribute.HasField("t")]
    inline += [tensor for attribute in attributes for tensor in attribute.tensors]
    places = []
    for tensor in graph.initializer:
        if tensor.data_location or tensor.external_data:
            found = {pair.key: pair.value for pair in tensor.external_data}
            if len(found) != len(tensor.external_data) or not found.keys() <= {
                "location",
                "offset",
                "length",
                "checksum",
            }:
                return False
            numbers = [found.get("offset", "0"), found.get("length", "0")]
            if not all(number.isascii() and number.isdigit() for number in numbers):
                return False
            places.append((found.get("location"), sum(map(int, numbers))))
    borders = [*graph.input, *graph.output]
    versions = [each.version for each in model.opset_import]
    made = [name for each in graph.node for name in each.output if name]
    return (
        sum(each.domain in ("", "ai.onnx") for each in model.opset_import) == 1
        and all(1 <= version <= graph_checks.MAX_OPSET for version in versions)
        and len(set(made)) == len(made)
        and all(name == printable(name) for name in names_of(model))
        and not model.functions
        and not model.training_info
        and not graph.sparse_initializer
        and all(each.domain in ("", "ai.onnx") for each in graph.node)
        and not any(each.op_type in graph_checks._FOREIGN for each in graph.node)
        and not any(a.HasField("g") or a.graphs or a.HasField("sparse_tensor") or a.sparse_tensors for a in attributes)
        and not any(tensor.data_location or tensor.external_data for tensor in inline)
        and all(name in listed and end <= listed[name] for name, end in places)
        and all(b.type.HasField("tensor_type") and b.type.tensor_type.elem_type in (1, 7) for b in borders)
        and all(b.type.tensor_type.HasField("shape") for b in borders)
    )


def names_of(model: onnx.ModelProto) -> Iterator[str]:
    """Yield every name that a library may repeat."""
    for each in model.opset_import:
        yield each.domain
    for pair in model.metadata_props:
        yield from (pair.key, pair.value)
    for tensor in model.graph.initializer:
        yield tensor.name
    for each in model.graph.node:
        yield from (each.name, each.op_type, each.domain, *each.input, *each.output)
        for attribute in each.attribute:
            yield attribute.name
            yield from (tensor.name for tensor in (attribute.t, *attribute.tensors))
    for border in (*model.graph.input, *model.graph.output):
        yield border.name
        yield from (axis.dim_param for axis in border.type.tensor_type.shape.dim)


NAMES = st.sampled_from(["Add", "Relu", "Loop", "NonZero", "Constant", "Reshape"])
LISTED = {"w.bin": 64}


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    """Draw a model of the parts that are looked at, most of them harmless."""

    def tensor() -> onnx.TensorProto:
        made = numpy_helper.from_array(np.zeros(draw(st.integers(0, 3)), np.float32), draw(st.text(max_size=3)))
        if draw(st.integers(0, 9)) == 0:
            made.data_location = draw(st.integers(0, 1))
            for key in draw(st.lists(st.sampled_from(["location", "offset", "length", "x"]), max_size=3)):
                made.external_data.add(key=key, value=draw(st.sampled_from(["w.bin", "x", "1", "65", "-1", ""])))
        return made

    def border() -> onnx.ValueInfoProto:
        dtype = draw(st.sampled_from([1, 1, 1, 7, 10]))
        shape = draw(st.sampled_from([["batch", 3], ["batch", 3], [], None]))
        kinds = [helper.make_tensor_type_proto(dtype, shape)] * 5 + [helper.make_sequence_type_proto(FLOATS)]
        return helper.make_value_info(draw(st.text(max_size=3)), draw(st.sampled_from(kinds)))

    nodes = []
    for _ in range(draw(st.integers(0, 4))):
        made = helper.make_node(
            draw(NAMES),
            ["a"],
            [draw(st.sampled_from("bcdefghijk"))],
            domain=draw(st.sampled_from(["", "", "ai.onnx", "x"])),
        )
        if draw(st.booleans()):
            values: list[Any] = [1, 0.5, "text", [1, 2], tensor(), [tensor(), tensor()], body()]
            made.attribute.append(helper.make_attribute("value", draw(st.sampled_from(values))))
        nodes.append(made)
    count = st.integers(0, 2)
    graph = helper.make_graph(
        nodes, "g", [border() for _ in range(draw(count))], [border() for _ in range(draw(count))],
        [tensor() for _ in range(draw(count))], doc_string=draw(st.text(max_size=4)),
    )  # fmt: skip
    return helper.make_model(graph)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=models(), edits=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=2))
def test_the_reader_agrees_with_that_of_onnx(
    model: onnx.ModelProto, edits: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Of whole graphs and of damaged ones: what passes here holds nothing forbidden for who parses it afterwards."""
    data = bytearray(model.SerializeToString())
    for at, value in edits:
        data[at % len(data)] = value
    (tmp_path / "model.onnx").write_bytes(data)
    try:
        check_graph_file(tmp_path / "model.onnx", LISTED)
        passed = True
    except BundleError:
        passed = False
    read = onnx.ModelProto()
    try:
        read.ParseFromString(bytes(data))
    except Exception:  # protobuf's own, whatever its implementation
        assert not passed or edits
        return
    if not edits or passed:
        assert passed == is_allowed(read, LISTED)


def forge(path: Path, model: onnx.ModelProto, *more: str) -> None:
    """Replace a bundle's graph and list further files, as a hostile maker would: with digests that fit."""
    (path / GRAPH).write_bytes(model.SerializeToString())
    manifest = Manifest.from_json((path / MANIFEST_NAME).read_bytes())
    roles = {entry.path: entry.role for entry in manifest.files} | dict.fromkeys(more, "graph-data")
    files = tuple(
        FileEntry(path=name, size=(path / name).stat().st_size, sha256=sha256_file(path / name), role=role)  # type: ignore[arg-type]
        for name, role in roles.items()
    )
    (path / MANIFEST_NAME).write_bytes(seal(msgspec.structs.replace(manifest, files=files)).to_json())
