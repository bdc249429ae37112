"""Export the decoder of a latent model: the last stage of a sampler graph, or a separate graph.

Names: nodes ``decoder/<module path>/<operator>``, weights ``decoder.<name in the state dict>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scm_sdk import __version__

from .cleanup import clean
from .io import EXTERNAL_DATA_ABOVE, GraphReport, write_model
from .partial_eval import BATCH_DIM, needed
from .trace import EXAMPLE_BATCH, trace_decoder, translate

if TYPE_CHECKING:
    import onnx_ir as ir

    from scm_sdk.model.decoder import Decoder

ROOT = "decoder"
INPUT, OUTPUT = "latents", "images"
IR_VERSION = 10


def export_decoder(decoder: Decoder, sample_shape: tuple[int, ...]) -> ir.Model:
    """Export a decoder, float32, opset 20, any batch size.

    Args:
        decoder: A float32 decoder in evaluation mode.
        sample_shape: Shape of one sample of latents, without the batch axis.

    Returns:
        A model with input ``latents``, the output of a latent sampler, and output ``images``.

    Raises:
        ExportError: If it cannot be exported; the message names the operator and the line where known.
        ShapeError: If its output differs from its config.
    """
    import torch

    device = next((p.device for p in decoder.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(0)
    example = torch.randn((EXAMPLE_BATCH, *sample_shape), generator=generator, device=device)
    model = clean(translate(trace_decoder(decoder, example), (INPUT,), OUTPUT), root=ROOT)
    _prefix(model)
    return model


def write_decoder(decoder: ir.Model, path: Path, *, external_data_above: int = EXTERNAL_DATA_ABOVE) -> GraphReport:
    """Write a decoder as a separate graph, for samplers that end with latents.

    Raises:
        ScmError: As ``write_model`` does.
    """
    import onnx_ir as ir

    x_0 = ir.val(INPUT, ir.DataType.FLOAT, decoder.graph.inputs[0].shape)
    images, nodes, initializers = decoder_stage(decoder, x_0)
    images.name = OUTPUT
    graph = ir.Graph(
        [x_0], [images], nodes=nodes, initializers=initializers, opset_imports={"": decoder.opset_imports[""]},
        name="decoder",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="scm-sdk", producer_version=__version__)
    return write_model(model, path, external_data_above=external_data_above)


def decoder_stage(decoder: ir.Model, x_0: ir.Value) -> tuple[ir.Value, list[ir.Node], list[ir.Value]]:
    """Return the decoder's output for a value of another graph, its nodes, and its weights, shared in memory.

    Args:
        decoder: Result of ``export_decoder``; it is not changed.
        x_0: Output of a latent sampler, ``(batch, *sample_shape)`` float32.
    """
    import onnx_ir as ir

    source = decoder.graph
    copies: dict[ir.Value, ir.Value] = {source.inputs[0]: x_0}
    weights = []
    for value in source.initializers.values():
        copies[value] = ir.val(value.name or "", const_value=value.const_value)
        weights.append(copies[value])
    nodes = []
    for node in needed(source.outputs, stop={}):
        for value in node.outputs:
            shape = None if value.shape is None else ir.Shape(value.shape)
            copies[value] = ir.Value(name=value.name, shape=shape, type=value.type)
        inputs = [None if value is None else copies[value] for value in node.inputs]
        outputs = [copies[value] for value in node.outputs]
        nodes.append(
            ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs, name=node.name)
        )
    return copies[source.outputs[0]], nodes, weights


def _prefix(model: ir.Model) -> None:
    """Prefix the names of the decoder for a sampler graph."""
    graph = model.graph
    for node in graph:
        node.name = f"{ROOT}/{node.name}"
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"{ROOT}/{value.name}"
    for name, value in list(graph.initializers.items()):
        value.name = f"{ROOT}.{name}"
        if value.const_value is not None:
            value.const_value.name = value.name
    (output,) = graph.outputs
    if output.shape is None or output.shape[0] != BATCH_DIM:
        raise AssertionError("the first axis of a decoder's output is the batch")
