"""Bundles without a network: sampler graphs of ten lines."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from scm_sdk.bundle.bundle import Bundle, publish_bundle, write_bundle
from scm_sdk.bundle.goldens import Golden, write_goldens
from scm_sdk.bundle.manifest import Artifact, ParityRecord
from scm_sdk.spec import SamplerSpec, default_times


class ToyBundle:
    """Makes a small bundle with every kind of file."""

    specs = tuple(SamplerSpec(times=default_times(n), sample_shape=(3, 4, 4), num_classes=2) for n in (1, 2))
    checkpoint = Artifact(path="denoiser", format="safetensors")
    graphs = tuple(Artifact(path=f"onnx/fp32/{n}step/model.onnx", format="onnx", num_inference_steps=n) for n in (1, 2))
    weights = "denoiser/diffusion_pytorch_model.safetensors"

    def golden(self, seed: int = 0) -> Golden:
        """Return three samples."""
        images = np.random.default_rng(seed).standard_normal((3, 3, 4, 4)).astype(np.float32)
        return Golden(images=images, seeds=np.array([5, 6, 2**63 - 1]), class_labels=np.array([0, 1, 0]))

    def fill(self, folder: Path, scale: float = 1.0) -> None:
        """Put everything but the manifest into a folder."""
        contents = {
            self.weights: save({"w": np.full((64, 4), scale, np.float32)}),
            "denoiser/config.json": b"{}",
            "README.md": b"# A model card\n",
            "reports/parity.json": b"{}",
        }
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for spec, graph in zip(self.specs, self.graphs, strict=True):
            write_linear_graph(folder / graph.path, spec)
        write_goldens(folder, {1: self.golden(1), 2: self.golden(2)})

    def export(self, path: Path, *, scale: float = 1.0, overwrite: bool = False, **changes: Any) -> Bundle:
        """Publish a bundle; ``changes`` go to ``write_bundle``."""
        parts: dict[str, Any] = {
            "name": "toy",
            "samplers": self.specs,
            "artifacts": [self.checkpoint, *self.graphs],
            "built_from": {graph.path: [self.weights] for graph in self.graphs},
            "provenance": {"license": "CC0-1.0", "seed": 1},
            "versions": {"onnx": "1.20"},
        }
        with publish_bundle(path, overwrite=overwrite) as folder:
            self.fill(folder, scale)
            write_bundle(folder, **(parts | changes))
        return Bundle.open(path)


def write_linear_graph(path: Path, spec: SamplerSpec, *, gain: float = 0.5, metadata: str | None = None) -> None:
    """Write a sampler graph in ten lines: ``gain`` times the sum of the noises, plus label / 10.

    Enough where a test is about the graph's borders and not about a network. ``metadata`` replaces
    the spec's JSON; "" leaves it out.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    axes = [1, *([1] * len(spec.sample_shape))]
    constants = {
        "gain": np.float32(gain),
        "tenth": np.float32(0.1),
        "ones": np.array([-1, *axes[1:]], np.int64),
        "table": np.arange(max(1, spec.num_classes), dtype=np.float32),
    }
    names = [tensor.name for tensor in spec.noise_inputs]
    nodes = [helper.make_node("Sum", names, ["sum"]), helper.make_node("Mul", ["sum", "gain"], ["scaled"])]
    last = "scaled"
    if spec.num_classes:
        nodes += [
            helper.make_node("Gather", ["table", "class_labels"], ["label"]),  # refuses labels that are not there
            helper.make_node("Mul", ["label", "tenth"], ["shift"]),
            helper.make_node("Reshape", ["shift", "ones"], ["shift_B111"]),
            helper.make_node("Add", ["scaled", "shift_B111"], ["shifted"]),
        ]
        last = "shifted"
    nodes.append(helper.make_node("Identity", [last], [spec.output_name]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], ["batch", *t.shape]) for t in spec.inputs],
        [helper.make_tensor_value_info(spec.output_name, TensorProto.FLOAT, ["batch", *spec.image_shape])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    text = spec.to_json() if metadata is None else metadata
    if text:
        helper.set_model_props(model, {"scm_spec": text})
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def parity_record(artifact: str) -> ParityRecord:
    """A comparison with ONNX Runtime that passed."""
    return ParityRecord(
        artifact=artifact,
        reference="denoiser",
        backend="onnxruntime",
        threshold=1e-5,
        noise_floor=1e-6,
        max_abs=2e-6,
        num_samples=32,
        passed=True,
    )
