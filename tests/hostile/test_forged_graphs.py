"""Forged ONNX graphs are refused or run; they never crash, hang or load what the manifest does not list."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostile.campaign import SEED, Limits, Silent, run_campaign
from hostile.forging import (
    ESCAPES,
    nested,
    read_json,
    reseal,
    run_cli,
    write_base,
)

pytestmark = pytest.mark.hostile
HERE = "hostile.test_forged_graphs"


_REFUSED = "refused"
GRAPHS: dict[str, Callable[..., Any]] = {}
"""Forgeries of a graph: each changes the model, or returns the file's bytes. Those of ``MUST_REFUSE`` may not run."""
MUST_REFUSE: set[str] = set()


def forgery(*, must: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        GRAPHS[function.__name__] = function
        if must:
            MUST_REFUSE.add(function.__name__)
        return function

    return put


def test_graphs(tmp_path: Path, record: Any) -> None:
    write_base(tmp_path / "base")
    cases = [[name, backend] for name in GRAPHS for backend in ("onnxruntime", "openvino", "precision")]
    cases += [[f"random {n}", backend] for n in range(300) for backend in ("onnxruntime", "openvino")]
    setup = {"base": str(tmp_path / "base"), "seed": SEED}
    limits = Limits(cpu_seconds=30, memory_bytes=4 << 30)
    record(run_campaign("forged graphs", f"{HERE}:prepare_graphs", cases, setup=setup, limits=limits))


def prepare_graphs(setup: dict[str, Any], scratch: Path) -> Callable[[list[Any]], None]:
    import onnx
    import openvino  # noqa: F401, before memory is limited

    import scm_sdk.export.cli  # noqa: F401
    from scm_sdk.inference.generator import Generator

    base = Path(setup["base"])
    (scratch / "outside.bin").write_bytes(bytes(4096))

    def attempt(case: list[Any]) -> None:
        name, backend = case
        folder = scratch / "bundle"
        shutil.copytree(base, folder)
        path = folder / "onnx/fp32/1step/model.onnx"
        try:
            model = onnx.load(path)
            if name.startswith("random"):
                data = mutated_message(path.read_bytes(), random.Random(f"{setup['seed']}/{name}"))
            else:
                data = GRAPHS[name](model, path.parent) or model.SerializeToString()
            path.write_bytes(data)
            reseal(folder)
            if backend == "precision":
                run_cli("precision", str(folder), "--num-samples", "2")
                return
            with Generator.from_pretrained(folder, backend=backend, precision="fp32", num_threads=1) as gen:
                images = gen(2, seed=1, class_labels=[0, 1], output_type="np").images
            if images.shape != (2, 4, 4, 3) or not np.isfinite(images).all():
                raise Silent("pictures that are none")
            if name in MUST_REFUSE:
                raise Silent("it ran")
        finally:
            shutil.rmtree(folder)

    for backend in ("onnxruntime", "openvino"):
        attempt(["harmless", backend])
    return attempt


def mutated_message(data: bytes, rng: random.Random) -> bytes:
    """Return a protobuf message with fields cut, doubled or swapped, lengths kept right at the top."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 4))):
        at, size = rng.randrange(len(changed)), rng.choice((1, 1, 2, 8))
        kind = rng.randrange(3)
        if kind == 0:
            changed[at : at + size] = rng.randbytes(size)
        elif kind == 1:
            changed[at : at + size] = b""
        else:
            changed[at:at] = changed[at : at + size]
    return bytes(changed)


def _external(model: Any, location: str, offset: str | None = None, length: str | None = None) -> None:
    from onnx import TensorProto

    tensor = next(t for t in model.graph.initializer if t.name == "table")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value


def _external_case(name: str, location: str, offset: str | None = None, length: str | None = None) -> None:
    def change(model: Any, folder: Path) -> None:
        (folder / "unlisted.bin").write_bytes(struct.pack("<2f", 5.0, 6.0))
        if name == "link":
            (folder / "link.bin").symlink_to("/etc/hostname")
        if name == "hard_link":
            os.link(folder.parents[3] / "outside.bin", folder / "hard.bin")
        if name == "fifo":
            os.mkfifo(folder / "fifo.bin")
        _external(model, location, offset, length)

    change.__name__ = f"external_{name}"
    forgery(must=True)(change)


@forgery()
def external_itself(model: Any, folder: Path) -> None:
    """The graph's own file is listed."""
    _external(model, "model.onnx", "0", "8")


for _case in (
    ("unlisted", "unlisted.bin"), ("up", "../../../../outside.bin"), ("absolute", "/etc/hostname"),
    ("device", "/dev/zero"), ("pointer", "*/_ORT_MEM_ADDR_/*", "4096", "8"), ("missing", "nothing.bin"),
    ("link", "link.bin"), ("hard_link", "hard.bin"), ("fifo", "fifo.bin"), ("folder", "."), ("empty", ""),
    ("beyond", "model.onnx", "99999999999", "8"),
    ("negative", "model.onnx", "-8", "8"), ("words", "model.onnx", "zero", "eight"),
    ("huge", "model.onnx", "0", str(2**63)), ("manifest", "../../../scm_manifest.json", "0", "8"),
    ("backslash", "..\\..\\outside.bin"), ("NUL", "unlisted.bin\0x"), ("url", "file:///etc/hostname"),
):  # fmt: skip
    _external_case(*_case)


@forgery()
def harmless(model: Any, _: Path) -> None:
    model.producer_name = "somebody"


@forgery()
def external_listed(model: Any, folder: Path) -> None:
    (folder / "model.onnx_data").write_bytes(struct.pack("<2f", 0.0, 1.0))
    _external(model, "model.onnx_data", "0", "8")
    manifest = folder.parents[2] / "scm_manifest.json"
    value = read_json(manifest)
    value["files"].append(
        {"path": "onnx/fp32/1step/model.onnx_data", "size": 0, "sha256": "0" * 64, "role": "graph-data"}
    )
    value["files"].sort(key=lambda entry: entry["path"])
    manifest.write_text(json.dumps(value), encoding="utf-8")


@forgery(must=True)
def external_in_subgraph(model: Any, folder: Path) -> None:
    from onnx import TensorProto, helper

    (folder / "unlisted.bin").write_bytes(bytes(192 * 4))
    constant = helper.make_tensor("hidden", TensorProto.FLOAT, [1, 3, 4, 4], bytes(192), raw=True)
    constant.ClearField("raw_data")
    constant.data_location = TensorProto.EXTERNAL
    entry = constant.external_data.add()
    entry.key, entry.value = "location", "unlisted.bin"
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["kept"], value=constant)],
        "branch", [], [helper.make_tensor_value_info("kept", TensorProto.FLOAT, None)],
    )  # fmt: skip
    _through(model, [
        helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("y", TensorProto.BOOL, [], [True])),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["before", "chosen"], ["after"]),
    ])  # fmt: skip


def _through(model: Any, nodes: list[Any]) -> None:
    """Put nodes that turn ``before`` into ``after`` in front of the output."""
    from onnx import helper

    last = model.graph.node[-1]
    source = last.input[0]
    first = helper.make_node("Identity", [source], ["before"])
    model.graph.node.pop()
    model.graph.node.extend([first, *nodes, helper.make_node("Identity", ["after"], [last.output[0]])])


def _const(name: str, value: Any) -> Any:
    from onnx import helper, numpy_helper

    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))


@forgery()
def ifs_nested_30(model: Any, _: Path) -> None:
    _ifs(model, 30)


@forgery()
def ifs_nested_3000(model: Any, _: Path) -> bytes | None:
    return _deep_ifs(model, 3000)


@forgery()
def ifs_nested_100000(model: Any, _: Path) -> bytes | None:
    return _deep_ifs(model, 100_000)


def _ifs(model: Any, depth: int) -> None:
    from onnx import TensorProto, helper

    out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Identity", ["before"], ["inner"])], "g0", [], [out])
    for level in range(depth):
        name = f"inner{level}"
        node = helper.make_node("If", ["yes"], [name], then_branch=graph, else_branch=graph)
        if level % 8:  # both branches of every level would be 2^depth nodes
            node = helper.make_node("If", ["yes"], [name], then_branch=graph, else_branch=helper.make_graph(
                [helper.make_node("Identity", ["before"], [name + "e"])], f"e{level}", [],
                [helper.make_tensor_value_info(name + "e", TensorProto.FLOAT, None)]))  # fmt: skip
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        graph = helper.make_graph([node], f"g{level + 1}", [], [info])
    _through(model, [
        _const("yes", np.array(True)), helper.make_node("If", ["yes"], ["after"], then_branch=graph, else_branch=graph)
    ])  # fmt: skip


def _deep_ifs(model: Any, depth: int) -> bytes:
    """Return a graph whose nested attributes are encoded here: the library's own encoder recurses."""

    def head(number: int, length: int) -> bytes:
        return _varint(number << 3 | 2) + _varint(length)

    inner = head(4, 8) + b"Identity"
    inner = head(1, len(inner)) + inner
    name, kind = head(1, 11) + b"then_branch", head(4, 2) + b"If"
    length, heads = len(inner), []
    for _ in range(depth):  # GraphProto.node.attribute.g, from the inside
        before = head(6, length)
        before = head(5, len(name) + len(before) + length) + name + before
        before = head(1, len(kind) + len(before) + length) + kind + before
        heads.append(before)
        length += len(before)
    return b"".join([model.SerializeToString(), head(7, length), *reversed(heads), inner])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _loop(model: Any, trips: Any, body_nodes: list[Any], condition: str) -> None:
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [*body_nodes, helper.make_node("Identity", ["x"], ["x_out"]), _const("go", np.array(True))],
        "body",
        [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("x", TensorProto.FLOAT, None)],
        [info(condition, TensorProto.BOOL, []), info("x_out", TensorProto.FLOAT, None)],
    )
    nodes = [_const("yes", np.array(True))]
    if trips is not None:
        nodes.append(_const("trips", np.array(trips, np.int64)))
    _through(model, [
        *nodes, helper.make_node("Loop", ["trips" if trips is not None else "", "yes", "before"], ["after"], body=body)
    ])  # fmt: skip


@forgery(must=True)
def loop_endless(model: Any, _: Path) -> None:
    _loop(model, None, [], "go")


@forgery(must=True)
def loop_of_2_62(model: Any, _: Path) -> None:
    _loop(model, 2**62, [], "go")


@forgery()
def loop_of_3(model: Any, _: Path) -> None:
    _loop(model, 3, [], "go")


@forgery()
def range_endless(model: Any, _: Path) -> None:
    from onnx import helper

    _through(model, [
        _const("a", np.int64(0)), _const("b", np.int64(2**62)), _const("s", np.int64(1)),
        helper.make_node("Range", ["a", "b", "s"], ["r"]), helper.make_node("ReduceSum", ["r"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["f"], to=1), helper.make_node("Add", ["before", "f"], ["after"]),
    ])  # fmt: skip


@forgery(must=True)
def constant_of_2_40(model: Any, _: Path) -> None:
    from onnx import helper

    _through(model, [
        _const("shape", np.array([2**40], np.int64)), helper.make_node("ConstantOfShape", ["shape"], ["z"]),
        helper.make_node("ReduceMax", ["z"], ["m"]), helper.make_node("Add", ["before", "m"], ["after"]),
    ])  # fmt: skip


@forgery(must=True)
def expand_to_2_40(model: Any, _: Path) -> None:
    from onnx import helper

    _through(model, [
        _const("shape", np.array([2**30, 2, 3, 4, 4], np.int64)), helper.make_node("Expand", ["before", "shape"],
        ["z"]),
        _const("axis", np.array([0], np.int64)), helper.make_node("ReduceMax", ["z", "axis"], ["after"], keepdims=0),
    ])  # fmt: skip


@forgery(must=True)
def tile_2_31(model: Any, _: Path) -> None:
    from onnx import helper

    _through(model, [
        _const("n", np.array([2**31, 1, 1, 1], np.int64)), helper.make_node("Tile", ["before", "n"], ["z"]),
        _const("first", np.array([0], np.int64)), _const("end", np.array([2], np.int64)),
        helper.make_node("Slice", ["z", "first", "end"], ["after"]),
    ])  # fmt: skip


@forgery()
def pads_of_2_40(model: Any, _: Path) -> None:
    from onnx import helper

    _through(model, [
        _const("p", np.array([0, 0, 0, 2**40, 0, 0, 0, -(2**40)], np.int64)),
        helper.make_node("Pad", ["before", "p"], ["after"]),
    ])  # fmt: skip


def _functions(model: Any, functions: list[tuple[str, list[str]]], calls: str) -> None:
    """Add local functions, each of which applies those it names one after the other."""
    from onnx import helper

    for name, inner in functions:
        steps = [helper.make_node(each, [f"v{i}"], [f"v{i + 1}"], domain="local") for i, each in enumerate(inner)]
        if not inner:
            steps = [helper.make_node("Identity", ["v0"], ["v1"])]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
        model.functions.append(helper.make_function("local", name, ["v0"], [f"v{len(steps)}"], steps, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    _through(model, [helper.make_node(calls, ["before"], ["after"], domain="local")])


@forgery()
def function_plain(model: Any, _: Path) -> None:
    _functions(model, [("F", [])], "F")


@forgery(must=True)
def function_recursive(model: Any, _: Path) -> None:
    _functions(model, [("F", ["F"])], "F")


@forgery(must=True)
def functions_mutual(model: Any, _: Path) -> None:
    _functions(model, [("F", ["G"]), ("G", ["F"])], "F")


@forgery(must=True)
def functions_doubling(model: Any, _: Path) -> None:
    _functions(model, [("F0", []), *((f"F{i}", [f"F{i - 1}"] * 2) for i in range(1, 40))], "F39")


@forgery()
def functions_long_chain(model: Any, _: Path) -> None:
    _functions(model, [("F0", []), *((f"F{i}", [f"F{i - 1}"]) for i in range(1, 3000))], "F2999")


@forgery()
def function_unknown(model: Any, _: Path) -> None:
    _functions(model, [("F", ["Nothing"])], "F")


@forgery()
def function_shadows_mul(model: Any, _: Path) -> None:
    from onnx import helper

    nodes = [helper.make_node("Sub", ["a", "b"], ["c"])]
    model.functions.append(helper.make_function("", "Mul", ["a", "b"], ["c"], nodes, [helper.make_opsetid("", 20)]))


def _input(model: Any, name: str = "noise_0") -> Any:
    return next(each for each in model.graph.input if each.name == name)


@forgery(must=True)
def input_double(model: Any, _: Path) -> None:
    _input(model).type.tensor_type.elem_type = 11


@forgery(must=True)
def input_string(model: Any, _: Path) -> None:
    _input(model).type.tensor_type.elem_type = 8


@forgery(must=True)
def input_type_99(model: Any, _: Path) -> None:
    _input(model).type.tensor_type.elem_type = 99


@forgery()
def input_without_type(model: Any, _: Path) -> None:
    _input(model).ClearField("type")


@forgery()
def input_without_shape(model: Any, _: Path) -> None:
    _input(model).type.tensor_type.ClearField("shape")


@forgery(must=True)
def input_sequence(model: Any, _: Path) -> None:
    kind = _input(model).type
    kind.Clear()
    kind.sequence_type.elem_type.tensor_type.elem_type = 1


@forgery(must=True)
def input_optional(model: Any, _: Path) -> None:
    kind = _input(model).type
    kind.Clear()
    kind.optional_type.elem_type.tensor_type.elem_type = 1


@forgery(must=True)
def input_map(model: Any, _: Path) -> None:
    kind = _input(model).type
    kind.Clear()
    kind.map_type.key_type = 7
    kind.map_type.value_type.tensor_type.elem_type = 1


@forgery()
def input_sparse(model: Any, _: Path) -> None:
    kind = _input(model).type
    kind.Clear()
    kind.sparse_tensor_type.elem_type = 1


def _dim(value: int) -> Callable[[Any, Path], None]:
    def change(model: Any, _: Path) -> None:
        for each in (_input(model), model.graph.output[0]):
            each.type.tensor_type.shape.dim[3].dim_value = value

    return change


for _value in (0, -1, -4, 1, 5, 2**31, 2**62):
    _change = _dim(_value)
    _change.__name__ = f"dim_{_value}"
    forgery(must=_value not in (0, -1, -4))(_change)


@forgery(must=True)
def rank_5(model: Any, _: Path) -> None:
    _input(model).type.tensor_type.shape.dim.add().dim_value = 1


@forgery()
def rank_200000(model: Any, _: Path) -> None:
    shape = _input(model).type.tensor_type.shape
    for _n in range(200_000):
        shape.dim.add().dim_value = 1


@forgery()
def batch_of_3_only(model: Any, _: Path) -> None:
    _input(model).type.tensor_type.shape.dim[0].dim_value = 3


@forgery(must=True)
def output_missing(model: Any, _: Path) -> None:
    del model.graph.output[:]


@forgery(must=True)
def output_renamed(model: Any, _: Path) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other"


@forgery(must=True)
def output_never_made(model: Any, _: Path) -> None:
    model.graph.node.pop()


@forgery()
def output_twice(model: Any, _: Path) -> None:
    model.graph.output.append(model.graph.output[0])


@forgery(must=True)
def output_additional(model: Any, _: Path) -> None:
    model.graph.output.append(model.graph.output[0])
    model.graph.output[1].name = "scaled"


@forgery()
def output_of_string(model: Any, _: Path) -> None:
    model.graph.output[0].type.tensor_type.elem_type = 8


@forgery(must=True)
def output_is_the_input(model: Any, _: Path) -> None:
    del model.graph.node[:]
    model.graph.output[0].name = "noise_0"


@forgery(must=True)
def input_missing(model: Any, _: Path) -> None:
    del model.graph.input[1]


@forgery(must=True)
def input_additional(model: Any, _: Path) -> None:
    model.graph.input.append(model.graph.input[0])
    model.graph.input[-1].name = "secret"


@forgery()
def input_twice(model: Any, _: Path) -> None:
    model.graph.input.append(model.graph.input[0])


@forgery()
def input_with_initializer(model: Any, _: Path) -> None:
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3, 4, 4), np.float32), "noise_0"))


@forgery(must=True)
def cycle(model: Any, _: Path) -> None:
    from onnx import helper

    _through(model, [
        helper.make_node("Add", ["before", "later"], ["after"]), helper.make_node("Identity", ["after"], ["later"])
    ])  # fmt: skip


@forgery(must=True)
def name_twice(model: Any, _: Path) -> None:
    from onnx import helper

    _through(
        model, [helper.make_node("Identity", ["before"], ["after"]), helper.make_node("Neg", ["before"], ["after"])]
    )


@forgery(must=True)
def unknown_operator(model: Any, _: Path) -> None:
    from onnx import helper

    _through(model, [helper.make_node("Conjure", ["before"], ["after"])])


@forgery(must=True)
def unknown_domain(model: Any, _: Path) -> None:
    from onnx import helper

    model.opset_import.append(helper.make_opsetid("com.evil", 1))
    _through(model, [helper.make_node("Identity", ["before"], ["after"], domain="com.evil")])


@forgery(must=True)
def no_opset(model: Any, _: Path) -> None:
    del model.opset_import[:]


def _opset(value: int) -> Callable[[Any, Path], None]:
    def change(model: Any, _: Path) -> None:
        model.opset_import[0].version = value

    return change


for _value in (-1, 0, 999, 2**62):
    _change = _opset(_value)
    _change.__name__ = f"opset_{_value}"
    forgery(must=True)(_change)


def _ir(value: int) -> Callable[[Any, Path], None]:
    def change(model: Any, _: Path) -> None:
        model.ir_version = value

    return change


for _value in (-1, 0, 1, 999, 2**62):
    _change = _ir(_value)
    _change.__name__ = f"ir_version_{_value}"
    forgery()(_change)


@forgery(must=True)
def no_graph(model: Any, _: Path) -> None:
    model.ClearField("graph")


@forgery(must=True)
def empty_file(model: Any, _: Path) -> bytes:
    return b"\n"


@forgery(must=True)
def text_file(model: Any, _: Path) -> bytes:
    return b"<html>not found</html>"


def _tensor(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.name == "table")


@forgery(must=True)
def weights_too_short(model: Any, _: Path) -> None:
    _tensor(model).raw_data = b"1234"


@forgery(must=True)
def weights_too_long(model: Any, _: Path) -> None:
    _tensor(model).raw_data = bytes(1 << 20)


@forgery(must=True)
def weights_of_negative_size(model: Any, _: Path) -> None:
    _tensor(model).dims[0] = -2


@forgery(must=True)
def weights_of_2_62(model: Any, _: Path) -> None:
    _tensor(model).dims[0] = 2**62


@forgery(must=True)
def weights_that_wrap(model: Any, _: Path) -> None:
    del _tensor(model).dims[:]
    _tensor(model).dims.extend([2**32, 2**32, 2])


@forgery(must=True)
def weights_of_type_99(model: Any, _: Path) -> None:
    _tensor(model).data_type = 99


@forgery(must=True)
def weights_of_strings(model: Any, _: Path) -> None:
    tensor = _tensor(model)
    tensor.ClearField("raw_data")
    tensor.data_type = 8
    tensor.string_data.extend([b"a", b"b"])


@forgery()
def weights_of_nan(model: Any, _: Path) -> None:
    _tensor(model).raw_data = struct.pack("<2f", float("nan"), float("inf"))


@forgery()
def weights_twice(model: Any, _: Path) -> None:
    model.graph.initializer.append(_tensor(model))


@forgery()
def weights_sparse(model: Any, _: Path) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(_tensor(model))
    sparse.values.name = "sparse"
    sparse.dims.extend([2**62])


def _spec_text(text: str | None) -> Callable[[Any, Path], None]:
    def change(model: Any, _: Path) -> None:
        entry = model.metadata_props[0]
        if text is None:
            del model.metadata_props[:]
        elif text == "twice":
            other = model.metadata_props.add()
            other.key, other.value = entry.key, entry.value.replace("1.5", "1.4")
        else:
            entry.value = text

    return change


for _name, _text in {
    "none": None, "empty": "", "junk": "junk", "deep": nested(100_000),
    "other": '{"times":[1.4],"sample_shape":[3,4,4]}',
    "twice": "twice", "long": "[" + "0," * 2_000_000 + "0]",
}.items():  # fmt: skip
    _change = _spec_text(_text)
    _change.__name__ = f"spec_{_name}"
    forgery(must=_name in ("junk", "deep", "other", "long"))(_change)


@forgery()
def escapes_everywhere(model: Any, _: Path) -> None:
    model.producer_name = model.doc_string = model.graph.name = model.graph.doc_string = ESCAPES
    for node in model.graph.node:
        node.name = ESCAPES + node.name


@forgery(must=True)
def escapes_in_an_operator(model: Any, _: Path) -> None:
    from onnx import helper

    _through(model, [helper.make_node(ESCAPES, ["before"], ["after"])])


@forgery(must=True)
def escapes_in_an_input(model: Any, _: Path) -> None:
    _input(model).name = ESCAPES
    for node in model.graph.node:
        node.input[:] = [ESCAPES if name == "noise_0" else name for name in node.input]


@forgery()
def doc_of_50_mb(model: Any, _: Path) -> None:
    model.doc_string = "a" * (50 << 20)


@forgery()
def nodes_20000(model: Any, _: Path) -> None:
    from onnx import helper

    names = ["before", *(f"n{i}" for i in range(19_999)), "after"]
    _through(model, [helper.make_node("Identity", [a], [b]) for a, b in itertools.pairwise(names)])


@forgery()
def names_not_utf8(model: Any, _: Path) -> bytes:
    return bytes(model.SerializeToString().replace(b"scaled", b"\xff\xfe\xc0\x80\xf5d"))


@forgery()
def python_operator(model: Any, _: Path) -> None:
    from onnx import helper

    model.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))
    _through(model, [helper.make_node("PyOp", ["before"], ["after"], domain="ai.onnx.contrib", code="import os")])


@forgery()
def unused_node_of_2_50(model: Any, _: Path) -> None:
    from onnx import helper

    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["unused shape"], ["unused"]))
    model.graph.node.insert(0, _const("unused shape", np.array([2**50], np.int64)))
