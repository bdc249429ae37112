"""Export the network once, compose samplers around it, and write them as ONNX files.

The exporter is the slow part, so it runs once for any number of samplers::

    network = export_network(model)
    for steps in (1, 2):
        write_model(compose_sampler(network, model.spec(steps)), folder / f"{steps}step" / "model.onnx")

``export_onnx`` does this for one sampler, ``export_samplers`` for several.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from scm_sdk import __version__
from scm_sdk._util.events import SILENT, Events
from scm_sdk._util.lazy import require
from scm_sdk.errors import ConfigError
from scm_sdk.spec import SamplerSpec

from ..precision.fp16_unsafe import ISLANDS_KEY
from .cleanup import clean
from .compose import compose_sampler
from .decoder import export_decoder, write_decoder
from .io import EXTERNAL_DATA_ABOVE, GRAPH_NAME, GraphReport, write_beside, write_model
from .partial_eval import TARGET_INPUT, TIME_INPUT
from .trace import EXAMPLE_BATCH, ROOT, require_exportable, trace_network, translate

if TYPE_CHECKING:
    import onnx_ir as ir

    from scm_sdk.model.consistency import ConsistencyModel

__all__ = [
    "GraphReport",
    "NetworkGraph",
    "compose_sampler",
    "export_network",
    "export_onnx",
    "export_samplers",
    "write_model",
]


@dataclass(frozen=True, kw_only=True)
class NetworkGraph:
    """A network ``F(x, t, conditioning)`` as a clean ONNX graph, for composing samplers.

    Attributes:
        model: Inputs ``x`` ``(batch, *sample_shape)``, ``t`` (1,), ``r`` (1,) of a flow map, and the conditioning,
            output ``F``. It shares memory with the weights of the torch model: write it before training continues.
        spec: A sampler of the model; composed samplers must be consistent with it.
        versions: Further metadata of the file.
        num_nodes_exported: Nodes before cleanup.
        decoder: Last stage of samplers that return pixels of a latent model; see ``decoder.export_decoder``.
        seconds: Wall time of the stages ``trace``, ``translate``, ``clean`` and ``decoder``.
    """

    model: ir.Model
    spec: SamplerSpec
    versions: Mapping[str, str]
    num_nodes_exported: int
    decoder: ir.Model | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """Nodes after cleanup."""
        return self.model.graph.num_nodes()


def export_network(model: ConsistencyModel, *, with_decoder: bool = True, events: Events = SILENT) -> NetworkGraph:
    """Export the network of a model, float32, opset 20, any batch size.

    Takes seconds for a small U-Net, a minute or more for a large one.

    Args:
        model: A float32 model in evaluation mode. Weights that are normalized on use are stored in normalized form;
            calling ``bake_weights_`` of ``model.networks.magnitude`` first avoids a copy.
        with_decoder: Whether to export a decoder, too; samplers that end in latents need none.
        events: Receives the stages.

    Raises:
        ExportError: If the model is in training mode or not float32, or if the network cannot be
            exported; the message names the operator and the line of the network where known.
        ShapeError: If the output of the network differs in shape or dtype from its input.
        UnsupportedGraphError: If the graph holds control flow, random numbers or foreign operators.
        BackendUnavailable: If torch, onnx, onnx_ir or onnxscript is not installed.
    """
    for library in ("torch", "onnx", "onnx_ir", "onnxscript"):
        require(library, extra="export", purpose="exporting to ONNX")
    import torch

    from scm_sdk.model.networks.magnitude import baked

    spec = model.spec(1)
    require_exportable(model)
    module = baked(model.network)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn((EXAMPLE_BATCH, *spec.sample_shape), generator=generator, device=device)
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    conditioning = {
        i.name: torch.zeros((EXAMPLE_BATCH, *i.shape), dtype=dtypes[i.dtype], device=device)
        for i in spec.conditioning_inputs
    }
    seconds: dict[str, float] = {}
    with _stage("trace", "trace the network", seconds, events):
        flow_map = model.config.flow_map
        program = trace_network(module, x, conditioning, flow_map=flow_map)
    with _stage("translate", "translate to ONNX", seconds, events):
        times = (TIME_INPUT, *((TARGET_INPUT,) if flow_map else ()))
        graph = translate(program, ("x", *times, *conditioning), "F")
    num_nodes_exported = graph.graph.num_nodes()
    with _stage("clean", "simplify the graph", seconds, events):
        clean(graph, root=ROOT)
    decoder = None
    if model.decoder is not None and with_decoder:
        with _stage("decoder", "export the decoder", seconds, events):
            decoder = export_decoder(model.decoder, spec.sample_shape)
    return NetworkGraph(
        model=graph,
        decoder=decoder,
        spec=spec,
        versions={
            "scm_sdk_version": __version__,
            "scm_exporter": f"torch {torch.__version__}",
            **({ISLANDS_KEY: " ".join(model.islands)} if model.islands else {}),
        },
        num_nodes_exported=num_nodes_exported,
        seconds=seconds,
    )


def export_onnx(
    model: ConsistencyModel,
    spec: SamplerSpec,
    path: Path,
    *,
    external_data_above: int = EXTERNAL_DATA_ABOVE,
    events: Events = SILENT,
) -> GraphReport:
    """Write one sampler of a model as an ONNX file; see ``export_samplers`` for several.

    Raises:
        ScmError: As ``export_network``, ``compose_sampler`` and ``write_model`` do.
    """
    (report,) = _export(model, {path: spec}, external_data_above, events)
    return report


def export_samplers(
    model: ConsistencyModel,
    specs: Sequence[SamplerSpec],
    folder: Path,
    *,
    decoder_path: Path | None = None,
    external_data_above: int = EXTERNAL_DATA_ABOVE,
    name: str = GRAPH_NAME,
    beside: str = "",
    events: Events = SILENT,
) -> tuple[GraphReport, ...]:
    """Write samplers of one model as ``folder/<n>step/<name>`` with a single export of the network.

    Args:
        model: In evaluation mode, float32.
        specs: One spec per number of steps.
        folder: ``onnx/fp32`` in a bundle; created if missing.
        decoder_path: File of the decoder as a graph of its own, with specs that end before it; None leaves it out.
        external_data_above: See ``write_model``.
        name: Name of each graph.
        beside: Name of the graphs of the same model at another size, which are in these folders, to share their
            weights: see ``write_beside``. "" is none.
        events: Receives the stages.

    Returns:
        One report for each spec, in the same order.

    Raises:
        ConfigError: If two specs have the same number of steps, or the model has no decoder to write.
        ScmError: As ``export_network``, ``compose_sampler`` and ``write_model`` do.
    """
    targets = {folder / f"{spec.num_inference_steps}step" / name: spec for spec in specs}
    if len(targets) != len(specs):
        steps = [spec.num_inference_steps for spec in specs]
        raise ConfigError(f"specs have {steps} steps, expected different numbers: each has its own folder.")
    if decoder_path is not None and model.decoder is None:
        raise ConfigError(
            "the decoder is asked for as a graph of its own, but this model has none, expected a latent model with its "
            "decoder. Leave --split out."
        )
    return _export(model, targets, external_data_above, events, decoder_path, beside)


def _export(
    model: ConsistencyModel,
    targets: Mapping[Path, SamplerSpec],
    external_data_above: int,
    events: Events,
    decoder_path: Path | None = None,
    beside: str = "",
) -> tuple[GraphReport, ...]:
    with_decoder = decoder_path is not None or any(spec.output == "pixels" for spec in targets.values())
    network = export_network(model, with_decoder=with_decoder, events=events)
    if decoder_path is not None and network.decoder is not None:
        events.stage("write the decoder")
        write_decoder(network.decoder, decoder_path, external_data_above=external_data_above)
    reports = []
    for path, spec in targets.items():
        seconds = dict(network.seconds)
        with _stage("compose", f"build the {spec.num_inference_steps}-step graph", seconds, events):
            sampler = compose_sampler(network, spec)
        with _stage("write", f"write the {spec.num_inference_steps}-step graph", seconds, events):
            if beside:
                report = write_beside(sampler, path, path.with_name(beside))
            else:
                report = write_model(sampler, path, external_data_above=external_data_above)
        reports.append(replace(report, seconds=seconds))
    return tuple(reports)


@contextmanager
def _stage(key: str, title: str, seconds: dict[str, float], events: Events) -> Iterator[None]:
    events.stage(title)
    start = time.perf_counter()
    yield
    seconds[key] = round(time.perf_counter() - start, 3)
