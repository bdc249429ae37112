"""The real thing, on a machine with a CUDA GPU: ``make gpu``.

Every test runs for each flavor that is installed and builds for this GPU; where one does not, or there is no GPU,
it is skipped with the reason. ``test_trt_backend.py`` and its neighbors hold what can be shown without.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scm_sdk import Generator
from scm_sdk._util.gpu import current_gpu
from scm_sdk._util.lazy import install_command, is_installed
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.engine_record import Flavor
from scm_sdk.engines.targets import resolve_target
from scm_sdk.engines.tensorrt import EXTRAS
from scm_sdk.errors import BackendError, ShapeError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.engines.add import add_engines
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.int8_variants import QuantizeOptions, add_int8
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.inference.latency import measure
from scm_sdk.inference.request import make_request
from scm_sdk.runtimes.tensorrt.device_memory import Cuda

# What NVIDIA's libraries deprecate is no reason to fail on an untested machine.
# Only engines of the cache that they were built into are trusted, and fixtures build into the session's.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.shared_cache,
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]
MIB = 2**20


@pytest.fixture(scope="module", params=["tensorrt_rtx", "tensorrt"])
def flavor(request: pytest.FixtureRequest) -> Flavor:
    name: Flavor = request.param
    gpu = current_gpu()
    if gpu is None:
        pytest.skip("no GPU, or no NVIDIA driver")
    if not is_installed(name):
        pytest.skip(f"{name} is not installed: {install_command(EXTRAS[name])}")
    if reason := resolve_target(gpu.compute_capability).unbuildable(name):
        pytest.skip(reason)
    return name


@pytest.fixture(scope="module")
def compute_capability(flavor: str) -> str:
    gpu = current_gpu()
    assert gpu is not None
    return gpu.compute_capability


@pytest.fixture(scope="module")
def bundle(
    flavor: Flavor, compute_capability: str, unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every precision that this GPU knows, as engines built for it."""
    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp(flavor) / "bundle"))
    for precision in ["fp16"] + ["bf16"] * (float(compute_capability) >= 8):
        add_precision(path, default_plan(precision), num_samples=1)
    add_int8(path, QuantizeOptions(precision="int8", base="fp16"))
    add_engines(path, [resolve_target(compute_capability)], flavor=flavor, skip_unbuildable=True)
    return path


@pytest.fixture
def fp16(bundle: Path, flavor: str) -> Iterator[Generator]:
    with Generator.from_pretrained(bundle, backend=flavor, precision="fp16", verify="none") as gen:
        yield gen


def test_engines_compute_what_the_checkpoint_computes(bundle: Path, flavor: Flavor, compute_capability: str) -> None:
    held = Bundle.open(bundle)
    target = resolve_target(compute_capability)
    graphs = [a for a in held.artifacts(format="onnx") if not target.lacks(a.precision, flavor)]
    engines = held.artifacts(format=flavor)
    assert len(engines) == len(graphs) >= 2
    names = {engine.precision for engine in engines}
    coarse = sorted(names & {"bf16", "int8"})
    results = validate_bundle(bundle, backends=[flavor], precisions=sorted(names - set(coarse)))
    if coarse:
        why = "an untrained net: its int8 graph itself is below the gate's 40 dB"
        results += validate_bundle(bundle, backends=[flavor], precisions=coarse, min_psnr_db=25, reason=why)
    assert {r.candidate for r in results} == {engine.path for engine in engines}
    for parity in results:
        parity.raise_if_failed()


def test_auto_takes_a_proved_engine(bundle: Path, flavor: str) -> None:
    validate_bundle(bundle, backends=[flavor], precisions=["fp16"])
    with Generator.from_pretrained(bundle) as gen:
        assert gen(seed=0).info.backend == flavor, gen.plan()


def test_the_plan_says_why_another_gpus_engine_does_not_run(
    bundle: Path, flavor: str, compute_capability: str, tmp_path: Path
) -> None:
    if flavor != "tensorrt_rtx":
        pytest.skip("TensorRT builds for the GPU it runs on only")
    other = "8.9" if compute_capability != "8.9" else "8.6"
    both = Path(shutil.copytree(bundle, tmp_path / "both"))
    add_engines(both, [resolve_target(other)], precisions=["fp16"], steps=[1])
    with Generator.from_pretrained(both, backend=flavor, precision="fp16", num_inference_steps=1) as gen:
        chosen, *others = (row for row in gen.plan() if row.precision == "fp16" and row.backend == flavor)
    assert chosen.accepted and compute_capability.replace(".", "") in chosen.artifact
    assert any(other in row.reason for row in others)


def test_a_seed_names_an_image_in_every_batch(fp16: Generator) -> None:
    together = fp16(5, seed=range(5), output_type="raw").images
    alone = np.concatenate([fp16(1, seed=s, output_type="raw").images for s in range(5)])
    # Another batch may run other kernels: half a level of an 8-bit picture.
    np.testing.assert_allclose(together, alone, atol=1 / 255)


def test_a_recorded_graph_gives_the_same_bits(fp16: Generator, flavor: str) -> None:
    backend: Any = fp16.opened().backend
    inputs = make_request(backend.spec, num_images=2, seed=7).inputs(0, 2)
    first, *others = (backend.sample(*inputs) for _ in range(4))
    assert all(np.array_equal(first, other) for other in others)
    if flavor == "tensorrt":
        assert all(context._graph is not None for context in backend._pool._idle if context.batch == 2)


def test_threads_get_their_own_images(fp16: Generator) -> None:
    expected = {s: fp16(2, seed=s, output_type="raw").images for s in range(8)}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda s: (s, fp16(2, seed=s, output_type="raw").images), list(range(8)) * 6))
    assert all(np.array_equal(images, expected[s]) for s, images in found)


def test_tensors_stay_on_the_gpu(fp16: Generator) -> None:
    torch = import_module("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch was built without CUDA: make gpu")
    backend: Any = fp16.opened().backend
    noise, conditioning = make_request(backend.spec, num_images=3, seed=11).inputs(0, 3)
    on_gpu = [torch.from_numpy(x).cuda() for x in noise]
    labels = {name: torch.from_numpy(x).cuda() for name, x in conditioning.items()}
    images = backend.sample_torch(on_gpu, labels)
    assert str(images.device) == backend.device
    np.testing.assert_array_equal(images.cpu().numpy(), backend.sample(noise, conditioning))
    side, device = torch.cuda.Stream(), torch.cuda.current_device()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = [backend.sample_torch(on_gpu, labels) for _ in range(3)]
    side.synchronize()
    assert all(torch.equal(x, images) for x in again) and torch.cuda.current_device() == device
    assert sum(not context.has_buffers for context in backend._pool._idle) == 1, "one context serves them all"
    with pytest.raises(ShapeError, match=r"noise.* on cpu, expected .* on cuda:0"):
        backend.sample_torch([x.cpu() for x in on_gpu], labels)


def test_closing_gives_the_memory_back(bundle: Path, flavor: str) -> None:
    cuda = Cuda(0, extra=EXTRAS[flavor])

    def round_trip() -> None:
        with Generator.from_pretrained(bundle, backend=flavor, precision="fp16", verify="none") as gen:
            for batch in (1, 2, 3):
                gen(batch, seed=0, output_type="raw")

    round_trip()  # what the library keeps until the process ends is taken now
    before = cuda.free_bytes()
    for _ in range(3):
        round_trip()
    assert before - cuda.free_bytes() < 16 * MIB


def test_an_engine_from_elsewhere_needs_trust(
    bundle: Path, flavor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-home"))
    with pytest.raises(BackendError, match="trust_engines=True"):
        Generator.from_pretrained(bundle, backend=flavor, precision="fp16")
    with Generator.from_pretrained(bundle, backend=flavor, precision="fp16", trust_engines=True) as gen:
        assert np.isfinite(gen(seed=0, output_type="raw").images).all()


def test_a_latency_is_measured(fp16: Generator) -> None:
    latency = measure({"engine": fp16}, batch=2, rounds=10, warmup=3)
    assert latency["engine"].median_ms > 0 and "gpu" in latency.machine
