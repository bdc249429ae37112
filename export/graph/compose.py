"""Compose the N-step sampler as one ONNX graph around a network that was exported once.

Every step has a copy of the network's nodes, and all copies share the weights. Each step has a fixed time, so values
that depend only on the time are computed here and stored; values that depend on the time and one of a few labels are
stored as a table. Around the network is the algebra of the sampler, float32 with constants computed in float64:

    x_t   = cos(t) x0 + sin(t) sigma_data noise          (no x0 in the first step)
    F     = network(x_t / sigma_data, t, class_labels)   (a flow map also takes r, the time that the step leads to)
    x0    = cos(t) x_t - sin(t) sigma_data F
    noise = sin(t) / sigma_data x_t + cos(t) F           (of the next step; only if ``renoise`` is ``ode``)

and after the last step the decoder of a latent model, if pixels are requested.

Names are structured: values ``step0/x_t``, ``step0/network_input``, ``step0/F``, ``step0/x0``
(the last ``x0`` is the output, ``images``), nodes ``step0/sampler/...`` for the algebra and
``step0/<module path>/<operator>`` for the network.

Source: arXiv 2410.11081, section 5.2; ``scm_sdk.model.sampler`` is the definition.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from scm_sdk import __version__
from scm_sdk.errors import ConfigError
from scm_sdk.spec import SamplerSpec

from .cleanup import check_time_folded, narrow_splits
from .decoder import decoder_stage
from .label_table import LABEL_INPUT, label_branch
from .partial_eval import (
    BATCH_DIM,
    TARGET_INPUT,
    TIME_INPUT,
    TIME_INPUTS,
    classify,
    needed,
    time_border,
    time_constants,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from .network import NetworkGraph

logger = logging.getLogger(__name__)

SPEC_KEY = "scm_spec"
"""Metadata key of the graph for the JSON of its spec."""
IR_VERSION = 10
"""IR version of opset 20; read by ONNX Runtime 1.18 and later."""
_BROADCASTING = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"}


def compose_sampler(network: NetworkGraph, spec: SamplerSpec) -> ir.Model:
    """Unroll a network over the times of a spec.

    Args:
        network: Result of ``export_network``; it is not changed and may be composed again.
        spec: The sampler, which defines the inputs of the graph.

    Returns:
        A model with inputs ``spec.inputs`` and one output ``spec.output_name``, batch dimension
        ``"batch"``, every value with type and shape. It shares the network's weights in memory.

    Raises:
        ConfigError: If the spec does not match the network.
        UnsupportedGraphError: If the time branch cannot be made constant; it names the node.
    """
    import onnx_ir as ir

    _check_fits(network, spec)
    unroller = _Unroller(network, spec)
    x0 = None
    for step in range(spec.num_inference_steps):
        x0 = unroller.add_step(step, x0)
    assert x0 is not None, "a spec has at least one time"
    if network.decoder is not None and spec.output == "pixels":
        x0, nodes, weights = decoder_stage(network.decoder, x0)
        unroller.nodes += nodes
        unroller.initializers |= {weight.name or "": weight for weight in weights}
    x0.name = spec.output_name
    graph = ir.Graph(
        list(unroller.inputs.values()),
        [x0],
        nodes=unroller.nodes,
        # Time constants that no node of the network reads are computed but unused.
        initializers=[value for value in unroller.initializers.values() if value.uses()],
        opset_imports={"": network.model.opset_imports[""]},
        name="sampler",
    )
    model = ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="scm-sdk",
        producer_version=__version__,
        metadata_props={SPEC_KEY: spec.to_json(), **network.versions},
    )
    logger.debug("compose: %d steps, %d nodes, %d stored tensors", spec.num_inference_steps, graph.num_nodes(),
                 len(graph.initializers))  # fmt: skip
    return check_time_folded(narrow_splits(model))


def _check_fits(network: NetworkGraph, spec: SamplerSpec) -> None:
    own = network.spec
    for name in ("sample_shape", "sigma_data", "conditioning_inputs"):
        if getattr(spec, name) != getattr(own, name):
            raise ConfigError(
                f"the spec has {name} {getattr(spec, name)}, expected {getattr(own, name)} as the exported "
                "network has. Make the spec with model.spec(num_inference_steps)."
            )
    decoded = network.decoder is not None and spec.output == "pixels"
    shape = own.image_shape if decoded else own.sample_shape
    if spec.image_shape != shape:
        raise ConfigError(
            f"the spec has output_shape {spec.output_shape}, expected {shape}: this composition ends with the "
            f"{'decoder' if decoded else 'consistency model and holds no decoder'}. Make it with model.spec, or leave "
            "output_shape empty for latents."
        )


class _Unroller:
    """Collects the inputs, nodes and stored tensors of the sampler step by step."""

    def __init__(self, network: NetworkGraph, spec: SamplerSpec) -> None:
        import onnx_ir as ir

        self.spec = spec
        self.source = network.model.graph
        self.classes = classify(self.source)
        (self.output,) = self.source.outputs
        types = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}
        self.inputs = {i.name: ir.val(i.name, types[i.dtype], ir.Shape([BATCH_DIM, *i.shape])) for i in spec.inputs}
        self.noise = self.inputs["noise_0"]  # of the next step
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.border = time_border(self.source, self.classes)
        self.labeled = label_branch(
            self.source, self.classes, num_classes=spec.num_classes, num_steps=spec.num_inference_steps
        )

    def add_step(self, step: int, x0: ir.Value | None) -> ir.Value:
        """Append one denoising step at ``spec.times[step]``: maps the last estimate to the next."""
        import numpy as np

        t, sigma_data = self.spec.times[step], self.spec.sigma_data
        cos, sin = math.cos(t), math.sin(t)
        if self.spec.renoise == "fresh":
            self.noise = self.inputs[f"noise_{step}"]
        noise = self.noise
        if x0 is None:
            x_t = self._scale(step, "x_t", noise, sin * sigma_data)
        else:
            mean = self._scale(step, "mean", x0, cos)
            spread = self._scale(step, "spread", noise, sin * sigma_data)
            x_t = self._apply(step, "Add", "x_t", mean, spread)
        unit = self._constant("sampler/sigma_data", np.array(sigma_data, dtype=np.float32))
        x = self._apply(step, "Div", "network_input", x_t, unit)
        F = self._add_network(step, x)
        kept = self._scale(step, "kept", x_t, cos)
        removed = self._scale(step, "removed", F, sin * sigma_data)
        if self.spec.renoise == "ode" and step + 1 < self.spec.num_inference_steps:
            old = self._scale(step, "noise_of_x_t", x_t, sin / sigma_data)
            new = self._scale(step, "noise_of_F", F, cos)
            self.noise = self._apply(step, "Add", "noise", old, new)
        return self._apply(step, "Sub", "x0", kept, removed)

    def _add_network(self, step: int, x: ir.Value) -> ir.Value:
        """Copy the network's nodes for one step and return its output."""
        import onnx_ir as ir

        copies: dict[ir.Value, ir.Value] = {
            value: x if value.name == "x" else self.inputs[value.name or ""]
            for value in self.source.inputs
            if value.name not in TIME_INPUTS
        }
        narrow: set[ir.Value] = set()  # one row for the whole batch
        for value, constant in zip(
            self.border, time_constants(self.source, self.border, self._times(step)), strict=True
        ):
            copies[value] = self._constant(f"step{step}/{value.name}", constant.array)
            if constant.per_sample:
                narrow.add(value)
        copies |= self._add_labels(step)

        def read(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
            if value is None:
                return None
            if value.is_initializer() and value not in copies:
                copies[value] = self._weight(value)
            if value in narrow and not _broadcasts(node, value):
                return self._expand(step, copies[value], x)
            return copies[value]

        for node in needed([self.output], stop=copies):
            inputs = [read(node, value) for value in node.inputs]
            for value in node.outputs:
                copies[value] = _like(value, f"step{step}/{value.name}")
            self.nodes.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    node.attributes.values(),
                    outputs=[copies[value] for value in node.outputs],
                    name=f"step{step}/{node.name}",
                )
            )
        if self.output in narrow:  # the network ignores its input
            return self._expand(step, copies[self.output], x)
        return copies[self.output]

    def _times(self, step: int) -> dict[str, float]:
        return {TIME_INPUT: self.spec.times[step], TARGET_INPUT: self.spec.targets[step]}

    def _add_labels(self, step: int) -> dict[ir.Value, ir.Value]:
        """Read one row of the step's table per sample; return the values of the label branch in it."""
        import numpy as np
        import onnx_ir as ir

        if self.labeled is None:
            return {}
        name, border = f"step{step}/labels", self.labeled.border
        found = self.labeled.rows(self.source, self._times(step))
        alike = all(rows.ndim > 1 for rows in found) and len({rows.shape[2:] for rows in found}) == 1  # contiguous
        # Single rows of one shape are contiguous for a whole batch: OpenVINO then splits them without a copy.
        stacked = alike and all(rows.shape[1] == 1 for rows in found) and found[0].ndim > 2
        axis, batch_axis = (0, 1) if stacked else (1, 0)
        laid = found if alike else [rows.reshape(len(rows), -1) for rows in found]
        laid = [np.swapaxes(rows, 0, batch_axis) for rows in laid]
        rows_of_all = np.concatenate(laid, axis=axis)
        table = self._constant(f"{name}/table", rows_of_all)

        def value_of(name: str, rows: np.ndarray) -> ir.Value:
            shape = [BATCH_DIM if i == batch_axis else length for i, length in enumerate(rows.shape)]
            return ir.val(name, table.dtype, ir.Shape(shape))

        row = value_of(f"{name}/row", rows_of_all)
        copies = {value: _like(value, f"step{step}/{value.name}") for value in border}
        parts = list(copies.values())
        if stacked or not alike:
            parts = [value_of(f"{name}/part{i}", rows) for i, rows in enumerate(laid)]
        split = [row, self._constant("labels/sizes", np.array([rows.shape[axis] for rows in laid], dtype=np.int64))]
        gather = [table, self.inputs[LABEL_INPUT]]
        self.nodes += [
            ir.Node("", "Gather", gather, [ir.AttrInt64("axis", batch_axis)], outputs=[row], name=f"{name}/Gather"),
            ir.Node("", "Split", split, [ir.AttrInt64("axis", axis)], outputs=parts, name=f"{name}/Split"),
        ]
        for (value, out), part, rows in zip(copies.items(), parts, found, strict=True):
            if part is not out:
                lengths = "_".join(map(str, rows.shape[1:]))
                shape = self._constant(f"labels/shape.{lengths}", np.array([-1, *rows.shape[1:]], dtype=np.int64))
                self.nodes.append(
                    ir.Node("", "Reshape", [part, shape], outputs=[out], name=f"{name}/{value.name}/Reshape")
                )
        return copies

    def _weight(self, value: ir.Value) -> ir.Value:
        """Return the shared copy of a weight."""
        import onnx_ir as ir

        name = value.name or ""
        if name not in self.initializers:
            self.initializers[name] = ir.val(name, const_value=value.const_value)
        return self.initializers[name]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        import onnx_ir as ir

        if name not in self.initializers:
            self.initializers[name] = ir.val(name, const_value=ir.tensor(array, name=name))
        return self.initializers[name]

    def _scale(self, step: int, name: str, value: ir.Value, factor: float) -> ir.Value:
        import numpy as np

        scalar = self._constant(f"step{step}/sampler/{name}.factor", np.array(factor, dtype=np.float32))
        return self._apply(step, "Mul", name, value, scalar)

    def _apply(self, step: int, op_type: str, name: str, *inputs: ir.Value) -> ir.Value:
        """Append one node of the sampler's algebra with the shape of a sample."""
        import onnx_ir as ir

        shape = ir.Shape([BATCH_DIM, *self.spec.sample_shape])
        out = ir.val(f"step{step}/{name}", ir.DataType.FLOAT, shape)
        self.nodes.append(ir.Node("", op_type, inputs, outputs=[out], name=f"step{step}/sampler/{name}/{op_type}"))
        return out

    def _expand(self, step: int, row: ir.Value, x: ir.Value) -> ir.Value:
        """Repeat one row for each sample, for a consumer that does not broadcast."""
        import numpy as np
        import onnx_ir as ir

        assert row.shape is not None and row.name is not None
        rest = [int(d) for d in row.shape[1:]]  # type: ignore[arg-type]
        name = f"{row.name}/per_sample_{len(self.nodes)}"
        batch = ir.val(f"{name}.batch", ir.DataType.INT64, ir.Shape([1]))
        target = ir.val(f"{name}.shape", ir.DataType.INT64, ir.Shape([1 + len(rest)]))
        out = ir.val(name, row.dtype, ir.Shape([BATCH_DIM, *rest]))
        tail = self._constant(f"{name}.rest", np.array(rest, dtype=np.int64))
        ends = [ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)]
        axis = [ir.AttrInt64("axis", 0)]
        self.nodes += [
            ir.Node("", "Shape", [x], ends, outputs=[batch], name=f"{name}/Shape"),
            ir.Node("", "Concat", [batch, tail], axis, outputs=[target], name=f"{name}/Concat"),
            ir.Node("", "Expand", [row, target], outputs=[out], name=f"{name}/Expand"),
        ]
        return out


def _like(value: ir.Value, name: str) -> ir.Value:
    import onnx_ir as ir

    shape = None if value.shape is None else ir.Shape(value.shape)
    return ir.Value(name=name, shape=shape, type=value.type)


def _broadcasts(node: ir.Node, value: ir.Value) -> bool:
    """Return whether ``node`` gives the same output if ``value`` has one row for the whole batch."""
    if node.op_type not in _BROADCASTING or value.shape is None:
        return False
    others = [v.shape for v in node.inputs if v is not None and v is not value and v.shape is not None]
    return any(len(s) == len(value.shape) and s[0] == BATCH_DIM for s in others)
