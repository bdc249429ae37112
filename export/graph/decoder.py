"""Export the decoder of a latent model: the last stage of a sampler graph, or a separate graph; and its encoder.

Names: nodes ``decoder/<module path>/<operator>``, weights ``decoder.<name in the state dict>``; those of the encoder
start with ``encoder``. A frame decoder is two graphs of its own, whose size does not grow with the clip.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scm_sdk import __version__
from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.json_struct import to_json
from scm_sdk.bundle.layout import FIRST_FRAME_PATH, FRAMES_PATH, NEXT_FRAMES_PATH
from scm_sdk.bundle.manifest import Role
from scm_sdk.errors import BundleError
from scm_sdk.inference.frames import FrameSettings, frame_inputs, frame_outputs

from .cleanup import clean
from .io import EXTERNAL_DATA_ABOVE, GraphReport, write_model
from .partial_eval import BATCH_DIM, needed
from .trace import EXAMPLE_BATCH, trace_decoder, trace_frame, translate

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from scm_sdk.model.decoder import Decoder, Encoder, FrameDecoder

ROOT = "decoder"
LATENTS, IMAGES = "latents", "images"
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
    return _export(decoder, sample_shape, (LATENTS, IMAGES), ROOT)


def export_encoder(encoder: Encoder) -> ir.Model:
    """Export an encoder, float32, opset 20, any batch size.

    Args:
        encoder: A float32 encoder in evaluation mode.

    Returns:
        A model with input ``images`` and output ``latents``, the data of a latent sampler.

    Raises:
        ExportError: If it cannot be exported; the message names the operator and the line where known.
        ShapeError: If its output differs from its config.
    """
    return _export(encoder, encoder.image_shape, (IMAGES, LATENTS), "encoder")


def _export(module: nn.Module, shape: tuple[int, ...], names: tuple[str, str], prefix: str) -> ir.Model:
    import torch

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(0)
    example = torch.randn((EXAMPLE_BATCH, *shape), generator=generator, device=device)
    model = clean(translate(trace_decoder(module, example), names[:1], names[1]), root=ROOT)
    _prefix(model, prefix)
    return model


def export_frame_decoder(frames: FrameDecoder, folder: Path) -> dict[str, Role]:
    """Write the two graphs of a frame decoder, float32, opset 20, any batch size, into the folder of a bundle.

    Args:
        frames: A float32 decoder in evaluation mode.
        folder: Folder of the bundle.

    Returns:
        Role of each written file whose name does not determine it.

    Raises:
        ExportError: If it cannot be exported; the message names the operator and the line where known.
        ScmError: As ``write_model`` does.
    """
    import torch

    settings = FrameSettings(
        sample_shape=frames.sample_shape, output_shape=frames.output_shape, cache_shapes=frames.cache_shapes
    )
    for path, first in ((FIRST_FRAME_PATH, True), (NEXT_FRAMES_PATH, False)):
        inputs = frame_inputs(settings, first=first)
        names = [tensor.name for tensor in inputs], [tensor.name for tensor in frame_outputs(settings, first=first)]
        # Not filled: caches of real clips have gigabytes, and nothing reads the numbers.
        latents, *caches = (torch.empty((EXAMPLE_BATCH, *tensor.shape)) for tensor in inputs)
        model = clean(translate(trace_frame(frames.module, latents, tuple(caches)), names[0], *names[1]), root=ROOT)
        model.ir_version = IR_VERSION
        write_model(model, folder / path)
    atomic_write_bytes(folder / FRAMES_PATH, to_json(settings), error=BundleError)
    return {FRAMES_PATH: "config"}


def write_decoder(decoder: ir.Model, path: Path, *, external_data_above: int = EXTERNAL_DATA_ABOVE) -> GraphReport:
    """Write a decoder, for samplers that end with latents, or an encoder as a separate graph.

    Raises:
        ScmError: As ``write_model`` does.
    """
    import onnx_ir as ir

    given, returned = decoder.graph.inputs[0], decoder.graph.outputs[0].name
    first = ir.val(given.name or "", ir.DataType.FLOAT, given.shape)
    last, nodes, initializers = decoder_stage(decoder, first)
    last.name = returned
    graph = ir.Graph(
        [first], [last], nodes=nodes, initializers=initializers, opset_imports={"": decoder.opset_imports[""]},
        name="decoder" if returned == IMAGES else "encoder",
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


def _prefix(model: ir.Model, prefix: str) -> None:
    """Prefix all names; those of a decoder share a graph with the network's."""
    graph = model.graph
    for node in graph:
        node.name = f"{prefix}/{node.name}"
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"{prefix}/{value.name}"
    for name, value in list(graph.initializers.items()):
        value.name = f"{prefix}.{name}"
        if value.const_value is not None:
            value.const_value.name = value.name
    (output,) = graph.outputs
    if output.shape is None or output.shape[0] != BATCH_DIM:
        raise AssertionError("the first axis of a decoder's output is the batch")
