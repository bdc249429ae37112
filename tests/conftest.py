"""What all tests share."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save

from helpers.commands import run
from helpers.toy_bundles import ToyBundle, write_linear_graph
from scm_sdk.bundle.bundle import publish_bundle, write_bundle
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.inference.generator import Generator
from scm_sdk.spec import SamplerSpec

if TYPE_CHECKING:
    import onnx_ir as ir

# Processes of pytest-xdist share the cores: one thread each. Set before torch is first imported, here or in a child.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed-offset",
        type=int,
        default=0,
        help="Add this to every seed that tests give torch and NumPy: what holds for one draw only then fails.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Shift the seeds that tests write down. Those of the package stay: other processes draw them, too."""
    offset = config.getoption("--seed-offset")
    if offset:
        import torch

        def shifted(seed: Any) -> Any:
            asked_by_a_test = Path(sys._getframe(2).f_code.co_filename).is_relative_to(Path(__file__).parent)
            return seed + offset if asked_by_a_test and isinstance(seed, int) else seed

        manual_seed, default_rng, generator = torch.manual_seed, np.random.default_rng, torch.Generator

        class ShiftedGenerator(generator):  # type: ignore[misc, valid-type]
            def manual_seed(self, seed: int) -> torch.Generator:
                return super().manual_seed(shifted(seed))

        torch.Generator = ShiftedGenerator  # type: ignore[misc]
        torch.manual_seed = lambda seed: manual_seed(shifted(seed))
        np.random.default_rng = lambda seed=None: default_rng(shifted(seed))


pytest_plugins = [
    "helpers.distributed_fixtures",
    "helpers.few_step_fixtures",
    "helpers.hub_fixtures",
    "helpers.sana_fixtures",
]

# No deadline: on a busy machine the clock of one example says nothing about the code.
# In CI the examples are the same every time, so that its verdict is the change's; a person's runs look for new ones.
settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("house")


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
        for variable in ("SCM_CACHE_DIR", "SCM_TRUST_ENGINES", "SCM_TELEMETRY"):
            patch.delenv(variable, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def cache_home(
    request: pytest.FixtureRequest, session_cache_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Give each test a cache of its own; those marked ``shared_cache`` find what fixtures and others of them built."""
    if request.node.get_closest_marker("shared_cache"):
        yield session_cache_home
        return
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def exports() -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which a network that was exported there before is not exported again.

    The exporter takes ten seconds for the smallest network; ``test_export_graph.py`` is about it, other tests are not.
    """
    from scm_sdk.export.graph import network
    from scm_sdk.model.consistency import ConsistencyModel

    real, made = network.export_network, {}

    def export_network(model: ConsistencyModel, *, with_decoder: bool = True, **options: Any) -> network.NetworkGraph:
        weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        decoder = model.decoder and (type(model.decoder.module), repr(model.decoder.latents))
        key = type(model.network), repr(model.config), with_decoder, decoder, hashlib.sha256(save(weights)).digest()
        if key not in made:
            made[key] = real(model, with_decoder=with_decoder, **options)
        return replace(made[key], spec=model.spec(1))  # of times that another config of the same network may have

    @contextmanager
    def shared() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network, "export_network", export_network)
            yield

    return shared


@pytest.fixture
def exported_once(exports: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let a test take the network of a checkpoint from an export of another test."""
    with exports():
        yield


@pytest.fixture(scope="session")
def unet_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a real, tiny, untrained U-Net whose labels and times matter."""
    import torch

    from scm_sdk.model.consistency import ConsistencyModel, ModelConfig
    from scm_sdk.model.networks.unet import UNetConfig

    shape = UNetConfig(
        image_size=8, channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=(8,), num_classes=4
    )
    with torch.random.fork_rng(devices=[]):  # the same weights whatever ran before
        torch.manual_seed(0)
        model = ConsistencyModel(ModelConfig(network=shape, class_names=("cat", "dog", "robot", "rocket")))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # the layers that start at zero would hide everything before them
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    folder = tmp_path_factory.mktemp("unet") / "checkpoint"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unet_bundle(unet_checkpoint: Path, exports: Callable[[], AbstractContextManager[None]]) -> Path:
    """Return the bundle of ``unet_checkpoint`` with its 1- and 2-step graphs, largest batch 5; read only."""
    from scm_sdk.export.bundle_export import export_bundle

    path = unet_checkpoint.parent / "bundle"
    with exports():
        export_bundle(unet_checkpoint, path, max_batch=5)
    return path


@pytest.fixture(scope="session")
def start_bundle(unet_checkpoint: Path, exports: Callable[[], AbstractContextManager[None]]) -> Path:
    """Return a bundle of ``unet_checkpoint`` that samples in 2 steps from noise, in 1 from an image; read only."""
    path = unet_checkpoint.parent / "start-bundle"
    with exports():
        run("onnx", unet_checkpoint, "-o", path, "--steps", 2, "--start-time", 0.9, "--max-batch", 2)
    return path


@pytest.fixture(scope="session")
def avatars_bundle(
    tmp_path_factory: pytest.TempPathFactory, exports: Callable[[], AbstractContextManager[None]]
) -> Path:
    """Return the bundle of the shipped model with its 2-step graph, largest batch 32; read only."""
    from importlib.resources import as_file, files

    from scm_sdk.export.bundle_export import export_bundle

    path = tmp_path_factory.mktemp("avatars") / "bundle"
    with exports(), as_file(files("scm_sdk.assets") / "avatars") as checkpoint:
        export_bundle(checkpoint, path, steps=(2,))
    return path


@pytest.fixture(scope="module")
def fp32(unet_bundle: Path) -> "ir.Model":
    """Return the U-Net's 2-step graph."""
    from scm_sdk.export.graph.io import read_model

    return read_model(unet_bundle / "onnx/fp32/2step/model.onnx")


@pytest.fixture(scope="module")
def spec(fp32: "ir.Model") -> SamplerSpec:
    """Return the sampler of the graph ``fp32``."""
    return SamplerSpec.from_json(fp32.metadata_props["scm_spec"])


@pytest.fixture(scope="session")
def graphs(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with the U-Net's 1-step graph in all precisions; read only."""
    from scm_sdk.export.precision.half import default_plan
    from scm_sdk.export.precision.int8_variants import QuantizeOptions, add_int8
    from scm_sdk.export.precision.variants import add_precision

    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("graphs") / "bundle"))
    add_precision(path, default_plan("fp16"), steps=[1], num_samples=1)
    add_precision(path, default_plan("bf16"), steps=[1], num_samples=1)
    add_int8(path, QuantizeOptions(num_samples=4), steps=[1])
    return path


@pytest.fixture(scope="session")
def engine_bundle(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with the U-Net's 1-step fp16 graph as a TensorRT-RTX engine for an L4; read only."""
    from scm_sdk.engines.targets import resolve_targets
    from scm_sdk.export.engines.add import add_engines

    path = Path(shutil.copytree(graphs, tmp_path_factory.mktemp("engine") / "bundle"))
    add_engines(path, resolve_targets(["l4"]), precisions=["fp16"])
    return path


@pytest.fixture
def engine(engine_bundle: Path, tmp_path: Path) -> Path:
    """Return that engine with its record, to be damaged."""
    folder = engine_bundle / "engines/tensorrt_rtx-sm89-fp16-1step"
    return Path(shutil.copytree(folder, tmp_path / "engine")) / "model.engine"


@pytest.fixture
def played(engine: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a maker of TensorRT backends whose GPU is played, and the recorder of its calls."""
    from helpers.played_gpu import play

    return play(engine, monkeypatch)


@pytest.fixture(scope="session")
def newcomer(session_cache_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which ``scm-export demo`` has run, in a process of its own."""
    root = tmp_path_factory.mktemp("newcomer")
    command = Path(sys.executable).with_name("scm-export")
    here = os.environ | {"XDG_CACHE_HOME": str(session_cache_home)}
    done = subprocess.run([command, "demo"], cwd=root, capture_output=True, encoding="utf-8", timeout=1500, env=here)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small convolutions become Winograd's products as large ones do."""
    from scm_sdk.export.precision import winograd

    for name in ("LEAST_CHANNELS", "LEAST_TILES", "LEAST_PRODUCT", "CHANNELS_PER_SIDE"):
        monkeypatch.setattr(winograd, name, 0)


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


@pytest.fixture(scope="session")
def linear_graph() -> Callable[..., None]:
    """Return the maker of linear sampler graphs."""
    return write_linear_graph


@pytest.fixture
def linear_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of bundles around ``write_linear_graph``, one graph for each spec."""

    def make(*specs: SamplerSpec, name: str = "linear", gain: float = 0.5, **changes: Any) -> Path:
        path = tmp_path / name
        artifacts = []
        with publish_bundle(path) as folder:
            for spec in specs:
                relative = f"onnx/fp32/{spec.num_inference_steps}step/model.onnx"
                write_linear_graph(folder / relative, spec, gain=gain)
                steps = spec.num_inference_steps
                artifacts.append(Artifact(path=relative, format="onnx", num_inference_steps=steps))
            write_bundle(folder, **({"name": name, "samplers": specs, "artifacts": artifacts} | changes))
        return path

    return make


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Twelve 8x8 gray images in three classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    path = tmp_path / "data.npz"
    np.savez(path, images=images, kind=np.arange(12) % 3, kind_names=np.array(["a", "b", "c"]))
    return path


@pytest.fixture(scope="session")
def edm_pickle() -> Callable[..., dict[str, Any]]:
    """Return a writer of pickles of EDM2's form around a small torch network; it returns the network's state dict."""
    from helpers.edm_pickles import write_edm_pickle

    return write_edm_pickle


@pytest.fixture
def pkl(edm_pickle: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """Return such a pickle."""
    path = tmp_path / "network-snapshot-0001024-0.050.pkl"
    edm_pickle(path)
    return path
