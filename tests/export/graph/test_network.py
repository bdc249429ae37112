"""Torch network -> sampler graph: equal to the torch sampler, clean, deterministic, atomic on disk."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers.recorded_events import Recorded
from scm_sdk.errors import ConfigError
from scm_sdk.export.graph.network import (
    NetworkGraph,
    compose_sampler,
    export_network,
    export_onnx,
    export_samplers,
    write_model,
)
from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
from scm_sdk.model.networks.unet import UNetConfig
from scm_sdk.model.sampler import Sampler
from scm_sdk.spec import SamplerSpec

TOLERANCE = 1e-5
"""Measured: at most 1.4e-6 on outputs of up to 2 (the 1.5M U-Net of ``pixels16``, random weights)."""
UNET = UNetConfig(image_size=8, channels=16, num_blocks=1, attention_resolutions=(4,), head_channels=16, num_classes=4)
TOY = UNetConfig(image_size=8, num_classes=5)


class Toy(nn.Module):
    """What other people's networks do: repeats the time for each sample, concatenates its embedding
    to the label's, normalizes weights on the fly, attends, asks tensors for their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(16, 24)
        self.label = nn.Embedding(5, 8)
        self.modulation = nn.Linear(32, 32)
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.qkv = nn.Parameter(torch.zeros(48, 16))
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        angle = t.expand(x.shape[0])[:, None] * torch.exp(-0.5 * torch.arange(8.0)) * 100
        time = functional.silu(self.time(torch.cat([angle.cos(), angle.sin()], dim=1)))
        emb = self.modulation(torch.cat([time, self.label(class_labels)], dim=1))
        scale, shift = emb[:, :, None, None].chunk(2, dim=1)
        h = functional.silu(self.norm(self.conv_in(x)) * (1 + scale) + shift)
        B, C, H, W = h.shape
        weight = self.qkv / self.qkv.square().sum(dim=1, keepdim=True).sqrt()
        q, k, v = (h.reshape(B, C, H * W).transpose(1, 2) @ weight.T).chunk(3, dim=2)
        h = torch.softmax(q @ k.transpose(1, 2) / C, dim=-1) @ v
        out: Tensor = self.conv_out(h.transpose(1, 2).reshape(B, C, H, W))
        return out


def _randomized(model: ConsistencyModel) -> ConsistencyModel:
    """Give every weight a value: fresh networks end in zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(fan_in))
    return model.eval()


MODELS = {
    "unet": lambda: _randomized(ConsistencyModel(ModelConfig(network=UNET))),
    "toy": lambda: _randomized(ConsistencyModel(ModelConfig(network=TOY), Toy())),
}


@functools.cache
def _exported(name: str) -> tuple[ConsistencyModel, NetworkGraph]:
    """A model and its network, exported once for the whole file."""
    model = MODELS[name]()
    return model, export_network(model)


@pytest.fixture(params=MODELS)
def exported(request):
    return _exported(request.param)


@pytest.fixture
def toy():
    return _exported("toy")


def _inputs(spec: SamplerSpec, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [
        torch.randn(batch, *i.shape, generator=generator)
        if i.dtype == "float32"
        else torch.arange(batch) % spec.num_classes
        for i in spec.inputs
    ]


def _run(
    graph: str | bytes, spec: SamplerSpec, inputs: list[Tensor], outputs: list[str] | None = None
) -> list[np.ndarray]:
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    feeds = {i.name: value.numpy() for i, value in zip(spec.inputs, inputs, strict=True)}
    result: list[np.ndarray] = session.run(outputs, feeds)  # pyright: ignore[reportAssignmentType]
    return result


def _bytes(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_equals_the_torch_sampler(exported, steps):
    model, network = exported
    spec = model.spec(steps)
    graph = _bytes(compose_sampler(network, spec))
    for batch in (1, 3, 8):
        inputs = _inputs(spec, batch)
        with torch.no_grad():
            expected = Sampler(model, spec).eval()(*inputs).numpy()
        (images,) = _run(graph, spec, inputs)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(images, expected, rtol=0, atol=TOLERANCE)


def test_every_step_equals_the_model(exported):
    """Cut after each step; each is fed with what the step before really returned."""
    model, network = exported
    spec = model.spec(times=(1.5, 1.1, 0.4))
    sampler = compose_sampler(network, spec)
    values = {v.name: v for node in sampler.graph for v in node.outputs}
    names = ["step0/x_t", "step0/x0", "step1/x_t", "step1/x0", "step2/x_t", "images"]
    sampler.graph.outputs.extend(values[name] for name in names[:-1])
    inputs = _inputs(spec, 3)
    found = [torch.from_numpy(a) for a in _run(_bytes(sampler), spec, inputs, names)]
    x_0 = torch.zeros_like(found[0])
    for t, noise, x_t, estimate in zip(spec.times, inputs, found[::2], found[1::2], strict=False):
        torch.testing.assert_close(x_t, math.cos(t) * x_0 + math.sin(t) * 0.5 * noise, rtol=0, atol=1e-6)
        with torch.no_grad():
            x_0 = model(x_t, torch.full((3,), t), inputs[-1])
        torch.testing.assert_close(estimate, x_0, rtol=0, atol=TOLERANCE)
        x_0 = estimate


def test_time_is_folded_and_weights_are_stored_once(exported, tmp_path):
    model, network = exported
    one, two = (write_model(compose_sampler(network, model.spec(n)), tmp_path / f"{n}.onnx") for n in (1, 2))
    graph = onnx.load(two.path).graph
    assert not {"Sin", "Cos", "Random", "If", "Loop"} & {node.op_type for node in graph.node}
    assert not [node.name for node in graph.node if "time" in node.name]
    # One network has its time branch; each step lost it.
    assert two.num_nodes < 2 * network.num_nodes
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    assert not stored.keys() & {"time_linear0.weight", "time_linear1.weight", "time.weight"}
    weights = model.network.state_dict()
    shared = weights.keys() & stored.keys()
    assert {"conv_in.weight", "conv_in.bias", "conv_out.weight"} <= shared
    for name in shared:
        np.testing.assert_array_equal(stored[name], weights[name].numpy())
    table = stored["step1/labels/table"].size if "step1/labels/table" in stored else 0
    assert two.num_parameters - one.num_parameters < 0.02 * one.num_parameters + table
    assert two.bytes - one.bytes < 0.02 * one.bytes + 4 * table + 400 * (two.num_nodes - one.num_nodes)
    assert two.num_parameters < 1.02 * sum(w.numel() for w in weights.values()) + 1000


def test_graph_is_what_the_spec_says(exported, tmp_path):
    model, network = exported
    spec = model.spec(2)
    report = write_model(compose_sampler(network, spec), tmp_path / "model.onnx")
    onnx.checker.check_model(str(report.path), full_check=True)
    proto = onnx.load(report.path)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert SamplerSpec.from_json(metadata["scm_spec"]) == spec
    assert metadata["scm_exporter"].startswith("torch ")
    assert (proto.producer_name, proto.producer_version) == ("scm-sdk", metadata["scm_sdk_version"])

    def shape(value: onnx.ValueInfoProto) -> list[int | str]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert {v.name: shape(v) for v in proto.graph.input} == {i.name: ["batch", *i.shape] for i in spec.inputs}
    assert {v.name: shape(v) for v in proto.graph.output} == {"images": ["batch", 3, 8, 8]}
    # Engines and quantizers read the shapes in between: all known, the batch the only symbol.
    known = {v.name: shape(v) for v in proto.graph.value_info}
    assert {o for n in proto.graph.node for o in n.output} - known.keys() == {"images"}
    for name, dims in known.items():
        assert all(d == "batch" or (isinstance(d, int) and d > 0) for d in dims), name
    names = [n.name for n in proto.graph.node]
    assert len(set(names)) == len(names)
    assert all(name.startswith(("step0/", "step1/")) for name in names)
    assert "step1/conv_in/Conv" in names


def test_no_trace_of_the_machine(exported, tmp_path):
    model, network = exported
    data = write_model(compose_sampler(network, model.spec(2)), tmp_path / "model.onnx").path.read_bytes()
    root = Path(__file__).resolve().parents[3]
    for mark in (str(root), "site-packages", str(Path.home()), str(tmp_path), ".py", "pkg.torch", "File "):
        assert mark.encode() not in data, mark


def test_labels_matter(toy):
    model, network = toy
    spec = model.spec(1)
    graph = _bytes(compose_sampler(network, spec))
    noise = _inputs(spec, 1)[0].expand(5, -1, -1, -1)
    (images,) = _run(graph, spec, [noise.contiguous(), torch.arange(5)])
    for a in range(5):
        for b in range(a):
            assert np.abs(images[a] - images[b]).max() > 1e-2


def test_exporting_twice_gives_the_same_bytes(toy, tmp_path):
    model, network = toy
    events = Recorded()
    again = export_onnx(model, model.spec(2), tmp_path / "a.onnx", events=events)
    first = write_model(compose_sampler(network, model.spec(2)), tmp_path / "b.onnx")
    assert again.sha256 == first.sha256
    assert events.stages == [
        "trace the network", "translate to ONNX", "simplify the graph", "build the 2-step graph",
        "write the 2-step graph",
    ]  # fmt: skip
    assert list(again.seconds) == ["trace", "translate", "clean", "compose", "write"]
    assert json.loads(json.dumps(again.to_dict()))["num_nodes"] == again.num_nodes > 0


def test_spec_of_another_model(toy, tmp_path):
    model, network = toy
    spec = model.spec(1)
    for change, message in [
        ({"sample_shape": (3, 16, 16)}, "sample_shape"),
        ({"sigma_data": 1.0}, "sigma_data 1.0, expected 0.5"),
        ({"num_classes": 0}, "conditioning_inputs"),
        ({"output_shape": (3, 64, 64)}, "holds no decoder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            compose_sampler(network, msgspec.structs.replace(spec, **change))
    with pytest.raises(ConfigError, match=r"specs have \[1, 1\] steps, expected different"):
        export_samplers(model, [spec, model.spec(times=(1.2,))], tmp_path)
