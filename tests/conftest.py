"""What all tests share."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save

from scm_sdk.bundle import Bundle, publish_bundle, write_bundle
from scm_sdk.generator import Generator
from scm_sdk.goldens import Golden, write_goldens
from scm_sdk.manifest import Artifact
from scm_sdk.spec import SamplerSpec, default_times

# No deadline: on a busy machine the clock of one example says nothing about the code.
# In CI the examples are the same every time, so that its verdict is the change's; a person's runs look for new ones.
settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("house")


class ToyBundle:
    """Makes a small bundle with every kind of file. Its graphs are no graphs: no backend opens them."""

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
        } | {graph.path: b"graph" * 20 for graph in self.graphs}
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        write_goldens(folder, {1: self.golden(1), 2: self.golden(2)})

    def export(self, path: Path, *, scale: float = 1.0, overwrite: bool = False, **changes: Any) -> Bundle:
        """Publish a bundle; ``changes`` go to ``write_bundle``."""
        parts: dict[str, Any] = {
            "name": "toy",
            "samplers": self.specs,
            "artifacts": [self.checkpoint, *self.graphs],
            "built_from": {graph.path: [self.weights] for graph in self.graphs},
            "provenance": {"licence": "CC0-1.0", "seed": 1},
            "versions": {"onnx": "1.20"},
        }
        with publish_bundle(path, overwrite=overwrite) as folder:
            self.fill(folder, scale)
            write_bundle(folder, **(parts | changes))
        return Bundle.open(path)


@pytest.fixture(scope="session")
def toy() -> ToyBundle:
    """Return the maker of toy bundles."""
    return ToyBundle()


@pytest.fixture(scope="session")
def made_bundle(toy: ToyBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle to look at and not to touch."""
    path = tmp_path_factory.mktemp("made") / "toy"
    toy.export(path)
    return path


@pytest.fixture
def bundle_copy(made_bundle: Path, tmp_path: Path) -> Path:
    """Return a bundle that the test may damage."""
    return Path(shutil.copytree(made_bundle, tmp_path / "toy"))


@pytest.fixture(scope="session", autouse=True)
def session_cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what fixtures of a module or the session build out of the user's cache: they run before ``cache_home``."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("session-cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what tests measure out of the user's cache, and the user's cache out of the tests."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def unet_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a real, tiny, untrained U-Net whose labels and times matter."""
    import torch

    from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
    from scm_sdk.model.unet import UNetConfig

    shape = UNetConfig(
        image_size=8, channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=(8,), num_classes=4
    )
    model = ConsistencyModel(ModelConfig(network=shape, class_names=("cat", "dog", "robot", "rocket")))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # the layers that start at zero would hide everything before them
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    folder = tmp_path_factory.mktemp("unet") / "checkpoint"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unet_bundle(unet_checkpoint: Path) -> Path:
    """Return the bundle of ``unet_checkpoint`` with its 1- and 2-step graphs, largest batch 5; read only."""
    from scm_sdk.export.pipeline import export_bundle

    path = unet_checkpoint.parent / "bundle"
    export_bundle(unet_checkpoint, path, max_batch=5)
    return path


@pytest.fixture(scope="session")
def graphs(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with the U-Net's 1-step graph in all precisions; read only."""
    from scm_sdk.export.precision import default_plan
    from scm_sdk.export.quantized_variants import QuantizeOptions, add_int8
    from scm_sdk.export.variants import add_precision

    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("graphs") / "bundle"))
    add_precision(path, default_plan("fp16"), steps=[1], num_samples=1)
    add_precision(path, default_plan("bf16"), steps=[1], num_samples=1)
    add_int8(path, QuantizeOptions(num_samples=4), steps=[1])
    return path


@pytest.fixture
def unet_copy(unet_bundle: Path, tmp_path: Path) -> Path:
    """Return a bundle of the U-Net that the test may change."""
    return Path(shutil.copytree(unet_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def ort(unet_bundle: Path) -> Iterator[Generator]:
    """Return the U-Net's generator over ONNX Runtime, one thread."""
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_threads=1) as gen:
        yield gen


@pytest.fixture(scope="session")
def reference(unet_bundle: Path) -> Iterator[Generator]:
    """Return the U-Net's generator over torch, one thread."""
    with Generator.from_pretrained(unet_bundle, backend="torch", num_threads=1) as gen:
        yield gen


def _linear_graph(path: Path, spec: SamplerSpec, *, gain: float = 0.5, metadata: str | None = None) -> None:
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


@pytest.fixture(scope="session")
def linear_graph() -> Callable[..., None]:
    """Return the maker of linear sampler graphs."""
    return _linear_graph


@pytest.fixture
def linear_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of bundles around ``_linear_graph``, one graph for each spec."""

    def make(*specs: SamplerSpec, name: str = "linear", gain: float = 0.5, **changes: Any) -> Path:
        path = tmp_path / name
        artifacts = []
        with publish_bundle(path) as folder:
            for spec in specs:
                relative = f"onnx/fp32/{spec.num_inference_steps}step/model.onnx"
                _linear_graph(folder / relative, spec, gain=gain)
                steps = spec.num_inference_steps
                artifacts.append(Artifact(path=relative, format="onnx", num_inference_steps=steps))
            write_bundle(folder, **({"name": name, "samplers": specs, "artifacts": artifacts} | changes))
        return path

    return make


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Twelve 8x8 grey images in three classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    path = tmp_path / "data.npz"
    np.savez(path, images=images, kind=np.arange(12) % 3, kind_names=np.array(["a", "b", "c"]))
    return path


@pytest.fixture(scope="session")
def edm_pickle() -> Callable[..., dict[str, Any]]:
    """Return a writer of pickles of EDM2's form around a small torch network; it returns the network's state dict.

    Every object carries the source of its class, which raises if anybody runs it.
    """
    import pickle
    import sys
    import types

    import torch

    class EasyDict(dict[str, Any]):
        """What such a file's options are."""

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("the pickle was run")

    def place(thing: Any, module: str) -> None:
        thing.__module__, thing.__qualname__ = module, thing.__name__
        for name in (module.partition(".")[0], module):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        setattr(sys.modules[module], thing.__name__, thing)

    class Persistent:
        """An object that brings its own code."""

        def __reduce__(self) -> Any:
            state = {k: v for k, v in self.__dict__.items() if k != "_compiled_call_impl"}
            meta = {
                "type": "class", "version": 6, "module_src": "raise AssertionError('the source was run')",
                "class_name": type(self).__name__, "state": state,
            }  # fmt: skip
            return _reconstruct_persistent_obj, (meta,), None

    class Conv(Persistent, torch.nn.Module):
        """A weight without a bias, as EDM2's."""

        def __init__(self, *shape: int, dtype: torch.dtype) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(*shape).to(dtype))
            self.gain = np.float64(0.5)  # EDM's networks keep such a number

    class Net(Persistent, torch.nn.Module):
        """Modules in a dict, a buffer, a buffer that is not kept, a parameter without axes."""

        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.enc = torch.nn.ModuleDict(
                {"8x8_conv": Conv(4, 2, 3, 3, dtype=dtype), "8x8_block0": Conv(4, 4, dtype=dtype)}
            )
            self.out_gain = torch.nn.Parameter(torch.zeros([]).to(dtype))
            self.register_buffer("freqs", torch.arange(6.0)[1:5].to(dtype))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

    class Precond(Persistent, torch.nn.Module):
        """The outer network."""

        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self._init_args: tuple[Any, ...] = ()
            self._init_kwargs = EasyDict(img_resolution=8, label_dim=10, channel_mult=[1, 2], sigma_data=0.5)
            self.unet = Net(dtype)

    class Encoder(Persistent):
        """Latents' means, as numpy arrays."""

        def __init__(self) -> None:
            self.scale = np.array([0.5, 2.0], np.float32)

    def write(path: Path, *, dtype: torch.dtype = torch.float16, change: Callable[[Any], None] | None = None) -> Any:
        nonlocal patch
        with pytest.MonkeyPatch.context() as patch:
            place(_reconstruct_persistent_obj, "torch_utils.persistence")
            place(EasyDict, "dnnlib.util")
            torch.manual_seed(0)
            network = Precond(dtype)
            root = EasyDict(ema=network, encoder=Encoder(), dataset_kwargs=EasyDict(path="imagenet", use_labels=True))
            if change:
                change(root)
            path.write_bytes(pickle.dumps(root, protocol=4))
        return network.state_dict()

    patch: Any = None
    return write
