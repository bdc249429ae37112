"""The census: what the kernels' names say about an engine, in TensorRT-RTX's words and in TensorRT's."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers.engine_helpers import graph, options
from scm_sdk.errors import ExportError
from scm_sdk.export.bundle_export import export_bundle
from scm_sdk.export.diagnose.weights import compare_stored
from scm_sdk.export.engines.census import Census, doubts, mismatches, parse_kernels, planned_census, take_census
from scm_sdk.export.engines.engine import build_engine
from scm_sdk.export.graph.io import read_model
from scm_sdk.export.precision.int8_variants import QuantizeOptions, add_int8
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.model.networks.custom import register_network
from scm_sdk.model.networks.layers import attend


def test_no_kernels_means_nothing_is_claimed(graphs: Path) -> None:
    model = read_model(graph(graphs, "fp16"))
    assert take_census(model, ["a log without kernels"]) is None


def test_a_census_sees_a_convolution_in_the_wrong_type(graphs: Path) -> None:
    model = read_model(graph(graphs, "fp16"))
    planned, types, _ = planned_census(model)
    lines = [
        f"Name: {n}_myl0_1, LayerType: correlation, Inputs: [ {{ Name: x, Datatype: Float }}], "
        f"Constants: [ {{ Datatype: Float }}], Outputs: [ {{ Datatype: Half }}], TacticName: , "
        f"Metadata: [ONNX Layer: {n}]"
        for n in types
    ]
    census = take_census(model, lines)
    assert census is not None and census.convolutions == {"Float": len(types)}
    (wrong,) = mismatches(planned, census)
    assert f"{len(types)} layers run in another type" in wrong
    unfused = doubts(Census(convolutions={}, attention=2, attention_fused=2), census)
    assert unfused[-1].endswith("of 2 attention blocks are one kernel")
    assert str(census).startswith(f"{len(types)} of {len(types)} convolutions Float")
    (kernel, *_) = parse_kernels(lines)
    assert (
        kernel.kind == "correlation"
        and kernel.nodes == (next(iter(types)),)
        and np.all(kernel.input_types == ("Float",))
    )


@pytest.mark.parametrize("weights", ["Half", "Float"])
def test_the_type_of_a_layer_is_that_of_its_weights_not_of_a_residual(weights: str) -> None:
    """As TensorRT-RTX 1.7.1 builds a convolution of Wan's decoder with the addition after it, which is in float32."""
    residual = "Half" if weights == "Float" else "Float"
    (kernel,) = parse_kernels(
        [
            f"Name: __myl_CorrCastAdd_myl0_112, LayerType: runtime_fusion, Inputs: [ "
            f"{{ Name: h, Datatype: {residual} }}, {{ Name: x, Datatype: {weights} }}], "
            f"Constants: [ {{ Datatype: {weights} }}], Outputs: [ {{ Datatype: Float }}], TacticName: , "
            "Metadata: [ONNX Layer: conv2/Conv][ONNX Layer: Add]"
        ]
    )
    assert kernel.computes_layer and kernel.type == weights


@pytest.mark.parametrize(("heads", "batch_one", "fused"), [(1, False, 1), (1, True, 0), (2, True, 1)])
def test_one_head_of_one_sample_is_planned_as_plain_products(heads: int, batch_one: bool, fused: int) -> None:
    """As TensorRT-RTX 1.7.1 builds DDPM++ of CIFAR-10, whose attention has one head, for batches of one."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        attend (float16[batch,{heads},64,256] q, float16[batch,{heads},256,64] k, float16[batch,{heads},64,256] v)
            => (float16[batch,{heads},64,256] y)
            <float16[batch,{heads},64,64] l, float16[batch,{heads},64,64] p>
        {{ l = MatMul (q, k) p = Softmax <axis = -1> (l) y = MatMul (p, v) }}"""
    planned, _, _ = planned_census(ir.from_onnx_text(text), batch_one=batch_one)
    assert (planned.attention, planned.attention_fused) == (1, fused)


@pytest.mark.parametrize(("kernel", "seen"), [("SlicSlicMulMulAddAddReshTran", 1), ("CastReshTran", 0)])
def test_a_convolution_of_few_channels_may_be_written_out(kernel: str, seen: int) -> None:
    """As TensorRT-RTX 1.7.1 builds a 1x1 convolution of 4 channels; a kernel that only prepares it is another."""
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        embed (float16[batch,4,8,8] x, float16[8,4,1,1] w) => (float16[batch,8,8,8] y) { y = Conv (x, w) }"""
    model = ir.from_onnx_text(text)
    model.graph[0].name = "step0/proj/Conv"
    line = (
        f"Name: __myl_{kernel}_myl0_7, LayerType: kgen, Inputs: [ {{ Name: x, Datatype: Half }}], Constants: [ "
        "{ Datatype: Half }], Outputs: [ { Datatype: Half }], TacticName: , Metadata: [ONNX Layer: step0/proj/Conv]"
    )
    census = take_census(model, [line])
    assert census is not None and census.convolutions == {"Half" if seen else "not found": 1}


@pytest.mark.parametrize(("size", "fused"), [(4, 0), (8, 0), (16, 1), (40, 1), (72, 1), (112, 1), (20, 0)])
def test_the_size_of_a_head_is_read_behind_the_mask(size: int, fused: int) -> None:
    """As TensorRT-RTX 1.7.1 builds SANA's attention to a prompt, of 72 and 112, and its tests' of 4; 16 tokens each."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        attend (float16[batch,2,64,{size}] q, float16[batch,2,{size},16] k, float16[batch,2,16,{size}] v,
                float16[batch,1,1,16] m) => (float16[batch,2,64,{size}] y)
            <float16[batch,2,64,16] l, float16[batch,2,64,16] a, float16[batch,2,64,16] p>
        {{ l = MatMul (q, k) a = Add (l, m) p = Softmax <axis = -1> (a) y = MatMul (p, v) }}"""
    planned, _, _ = planned_census(ir.from_onnx_text(text))
    assert (planned.attention, planned.attention_fused) == (1, fused)


def test_a_1x1_convolution_may_become_a_matrix_product(graphs: Path) -> None:
    """As TensorRT-RTX 1.7.1 builds the attention's projections of a network with 256 channels at 16x16."""
    model = read_model(graph(graphs, "fp16"))
    planned, types, _ = planned_census(model)
    lines = [
        f"Name: __myl_FcAdd_myl0_{i}, LayerType: runtime_fusion, Inputs: [ {{ Name: x, Datatype: Half }}], "
        f"Constants: [ {{ Datatype: Half }}], Outputs: [ {{ Datatype: Half }}], TacticName: , "
        f"Metadata: [ONNX Layer: {n}]__gemm_from_conv1x1"
        for i, n in enumerate(types)
    ]
    census = take_census(model, lines)
    assert census is not None and census.convolutions == planned.convolutions == {"Half": len(types)}


def tensorrt_line(names: list[str], data: str, weights: str, kind: str = "CaskConvolution") -> str:
    """A kernel as TensorRT 10's documentation and users' logs show it; written here, not run here."""
    tensor = f"Location: Device, Dimensions: [1,8,8,8], Format/Datatype: {data}"
    nodes = "\x1e".join(f"[ONNX Layer: {name}]" for name in names)
    return (
        f"Name: {' + '.join(names)}, LayerType: {kind}, Inputs: [ {{ Name: x, {tensor} }}], Outputs: [ {{ Name: y, "
        f'{tensor} }}], ParameterType: Convolution, Kernel: [3,3], OutMaps: 8, Groups: 1, Weights: {{"Type": '
        f'"{weights}", "Count": 576}}, Bias: {{"Type": "Float", "Count": 8}}, HasBias: 1, Activation: NONE, '
        f"TacticName: sm80_xmma_fprop_implicit_gemm, TacticValue: 0x9251329244d2a80b, StreamId: 0, Metadata: {nodes}"
    )


@pytest.mark.parametrize(
    ("data", "weights", "kind", "found"),
    [
        ("Half", "Half", "CaskConvolution", "Half"),
        ("Channel major FP16 format where channel % 8 == 0", "Half", "CaskConvolution", "Half"),
        ("Thirty-two wide channel vectorized row major Int8 format", "Int8", "CaskConvolution", "Int8"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "Int8", "CaskGemmConvolution", "Int8"),
        ("Row major linear FP32", "Float", "CaskFlattenConvolution", "Float"),
        ("Row major linear BF16 format", "BFloat16", "CaskGemmMatrixMultiply", "BFloat16"),
        ("Row major linear FP16 format", "Int8", "CaskConvolution", "Half"),
    ],
)
def test_tensorrts_own_lines_are_read(data: str, weights: str, kind: str, found: str) -> None:
    (kernel,) = parse_kernels([f"Layers:\n{tensorrt_line(['pre/act', 'a/conv'], data, weights, kind)}\n\nBindings:\nx"])
    assert kernel.computes_layer and kernel.type == found
    assert kernel.nodes == ("pre/act", "a/conv"), "U+001E between them ends no line"
    (copy,) = parse_kernels([tensorrt_line(["a/conv"], data, weights, "Reformat")])
    assert not copy.computes_layer


def test_what_no_kernel_names_is_a_doubt_and_a_wrong_type_a_mismatch(graphs: Path) -> None:
    model = read_model(graph(graphs, "int8"))
    planned, types, _ = planned_census(model)
    first, *others = types
    int8, half = ("Thirty-two wide channel vectorized row major Int8 format", "Int8"), ("Half", "Half")
    lines = [tensorrt_line([n], *(int8 if types[n] == "Int8" else half)) for n in others]
    census = take_census(model, ["Layers:\n" + "\n".join(lines)])
    assert census is not None and census.unseen == (first,) and mismatches(planned, census) == []
    assert doubts(planned, census)[0] == f"1 layers are named by no kernel ({first})"
    wrong = take_census(model, [*lines, tensorrt_line([first], "Row major linear FP32", "Float")])
    assert wrong is not None and wrong.odd == (f"{first}: Float, not {types[first]}",) and wrong.unseen == ()
    assert len(mismatches(planned, wrong)) == 1


@register_network("tests/attention")
class Attention(nn.Module):
    """Attention behind one layer for queries, keys and values, or three."""

    def __init__(self, one: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.before = nn.ModuleList([nn.Linear(64, 192)] if one else [nn.Linear(64, 64) for _ in range(3)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = functional.silu(self.first(x) * t.cos()[:, None, None])
        found = [layer(h) for layer in self.before]
        q, k, v = found[0].chunk(3, dim=2) if len(found) == 1 else found
        q, k, v = (each.reshape(x.shape[0], -1, 2, 32).transpose(1, 2) for each in (q, k, v))
        return self.last(attend(q, k, v).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("one", [True, False])
def test_an_int8_product_that_is_split_runs_in_half_and_is_refused(tmp_path: Path, one: bool) -> None:
    """TensorRT-RTX 1.7.1 takes the weights of one layer apart, in half precision; three layers become one kernel."""
    torch.manual_seed(0)
    model = ConsistencyModel(network=Attention(one), sigma_data=0.5, sample_shape=(16, 64), arguments={"one": one})
    model.eval().save_pretrained(tmp_path / "model")
    export_bundle(tmp_path / "model", tmp_path / "bundle", steps=(1,))
    (made,) = add_int8(tmp_path / "bundle", QuantizeOptions(num_samples=4))
    assert made.notes[0] == ("1 of 3 MatMul in int8" if one else "3 of 5 MatMul in int8")
    low, full = (read_model(graph(tmp_path / "bundle", precision)) for precision in ("int8", "fp32"))
    assert [node.op_type for node in low.graph].count("QuantizeLinear") == 1, "what all three read is rounded once"
    assert not compare_stored(low, {k: v.const_value.numpy() for k, v in full.graph.initializers.items()}).changed
    arguments = (graph(tmp_path / "bundle", "int8"), tmp_path / "engine", options("8.0"))
    if one:
        with pytest.raises(ExportError, match=r"1 layers .*before\.0/MatMul: Half, not Int8"):
            build_engine(*arguments)
        return
    census = build_engine(*arguments).census["built"]
    assert census["products"] == {"Half": 2, "Int8": 3} and census["attention_fused"] == 1
