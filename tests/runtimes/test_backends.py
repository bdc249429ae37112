"""Backends: what they refuse, what they translate, and that many threads get the right images."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scm_sdk.errors import BackendFailure, BackendUnavailable, BundleError, ConfigError, IntegrityError, ShapeError
from scm_sdk.inference.backends import BACKENDS, Backend, open_backend
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.parity.compare import compare
from scm_sdk.inference.parity.reference import run_reference
from scm_sdk.inference.request import make_example
from scm_sdk.noise import draw_noise
from scm_sdk.spec import SamplerSpec, TensorSpec

GRAPH_BACKENDS = [name for name, info in BACKENDS.items() if "onnx" in info.opens]
CPU_BACKENDS = sorted(name for name, info in BACKENDS.items() if {"onnx", "safetensors"} & set(info.opens))
SPEC = SamplerSpec(times=(1.56, 1.1), sample_shape=(3, 4, 4), num_classes=3, max_batch=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def inputs(spec: SamplerSpec, batch: int = 2) -> tuple[list[Any], dict[str, np.ndarray]]:
    labels = np.arange(batch, dtype=np.int64) % spec.num_classes
    return list(draw_noise(spec, range(batch))), {"class_labels": labels}


@pytest.fixture
def graph(tmp_path: Path, linear_graph: Any) -> Path:
    linear_graph(tmp_path / "model.onnx", SPEC)
    return tmp_path / "model.onnx"


@pytest.fixture(params=CPU_BACKENDS)
def opened(request: pytest.FixtureRequest, unet_bundle: Path, ort: Any, reference: Any) -> Backend:
    if request.param in ("onnxruntime", "torch"):
        return (ort if request.param == "onnxruntime" else reference).opened(2).backend
    return open_backend(request.param, unet_bundle / "onnx/fp32/2step/model.onnx", ort.opened(2).spec, num_threads=1)


def test_a_backend_is_what_has_three_members(opened: Backend) -> None:
    assert isinstance(opened, Backend)
    assert not isinstance(object(), Backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: (n[:1], c), "noise holds 1 arrays, expected 2"),
        (lambda n, c: ([n[0], n[1][:1]], c), r"noise_1 is \(1, 3, 8, 8\) float32, expected \(2, 3, 8, 8\)"),
        (lambda n, c: ([n[0].astype(np.float64), n[1]], c), "noise_0 is .* float64, expected .* float32"),
        (lambda n, c: ([a[:0] for a in n], c), r"a batch of 0; expected 1\.\.5"),
        (lambda n, c: ([np.concatenate([a] * 3) for a in n], c), r"a batch of 6; expected 1\.\.5"),
        (lambda n, c: ([np.float32(0), n[1]], c), r"a batch of 0; expected 1\.\.5"),
        (lambda n, c: (n, {}), r"conditioning holds \[\], expected exactly \['class_labels'\]"),
        (lambda n, c: (n, c | {"x": n[0]}), "expected exactly"),
        (lambda n, c: (n, {"class_labels": c["class_labels"].astype(np.int32)}), "int32, expected .* int64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(opened: Backend, change: Callable[..., Any], message: str) -> None:
    noise, conditioning = change(*inputs(opened.spec))
    with pytest.raises(ShapeError, match=message):
        opened.sample(noise, conditioning)


def test_many_threads_get_what_one_gets(opened: Backend) -> None:
    jobs = [inputs(opened.spec, batch) for batch in (1, 2, 3, 5)] * 4
    alone = [opened.sample(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: opened.sample(*job), jobs))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def in_batches(opened: Backend, size: int, count: int = 16) -> np.ndarray:
    request = make_example(opened.spec, range(count))
    parts = [opened.sample(*request.inputs(at, min(at + size, count))) for at in range(0, count, size)]
    return np.concatenate(parts)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
def test_a_graph_gives_a_seed_the_same_bits_in_any_batch(backend: str, num_threads: int, unet_bundle: Path) -> None:
    """The promise of docs/gates.md, for each number of threads."""
    for steps in (1, 2):
        with Generator.from_pretrained(
            unet_bundle, backend=backend, num_threads=num_threads, num_inference_steps=steps, verify="none"
        ) as gen:
            alone = in_batches(gen.opened().backend, 1)
            for size in (2, 3, 5):
                np.testing.assert_array_equal(in_batches(gen.opened().backend, size), alone)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_reduced_precision_gives_a_seed_the_same_bits_in_one_thread(precision: str, graphs: Path) -> None:
    with Generator.from_pretrained(
        graphs, backend="onnxruntime", precision=precision, num_threads=1, num_inference_steps=1, verify="none"
    ) as gen:
        alone = in_batches(gen.opened().backend, 1)
        for size in (2, 3, 5):
            np.testing.assert_array_equal(in_batches(gen.opened().backend, size), alone)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_threads_and_backends_change_a_seed_by_rounding(backend: str, unet_bundle: Path, reference: Any) -> None:
    """PyTorch orders its sums by batch and threads, so it promises no bits, and each other backend orders its own."""
    run = run_reference(reference, seeds=range(8), batches=[1, 5])
    for num_threads in (1, 2, 4):
        with Generator.from_pretrained(unet_bundle, backend=backend, num_threads=num_threads, verify="none") as gen:
            compare(gen, run).raise_if_failed()


def test_inputs_may_be_views_and_read_only(opened: Backend) -> None:
    noise, conditioning = inputs(opened.spec, 4)
    views = [array[::2] for array in noise]
    for view in views:
        view.setflags(write=False)
    labels = {"class_labels": conditioning["class_labels"][::2]}
    found = opened.sample(views, labels)
    copies = {"class_labels": labels["class_labels"].copy()}
    np.testing.assert_array_equal(found, opened.sample([view.copy() for view in views], copies))


@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
def test_the_linear_graph_gives_its_formula(backend: str, graph: Path) -> None:
    noise, conditioning = inputs(SPEC, 3)
    images = open_backend(backend, graph, SPEC).sample(noise, conditioning)
    shift = conditioning["class_labels"].reshape(3, 1, 1, 1) / 10
    np.testing.assert_allclose(images, 0.5 * (noise[0] + noise[1]) + shift, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_closed_backend_says_so(backend: str, unet_bundle: Path, unet_checkpoint: Path, ort: Any) -> None:
    spec = ort.opened(1).spec
    path = unet_checkpoint if backend == "torch" else unet_bundle / "onnx/fp32/1step/model.onnx"
    opened = open_backend(backend, path, spec, num_threads=1)
    opened.close()
    opened.close()
    with pytest.raises(BackendFailure, match="was closed, expected an open one"):
        opened.sample(*inputs(spec))


def test_an_unknown_backend_lists_the_known(graph: Path) -> None:
    with pytest.raises(ConfigError, match=r"backend is 'tpu', .*onnxruntime.*, tensorrt_rtx"):
        open_backend("tpu", graph, SPEC)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_arguments_of_opening(backend: str, unet_bundle: Path, unet_checkpoint: Path, ort: Any) -> None:
    path = unet_checkpoint if backend == "torch" else unet_bundle / "onnx/fp32/1step/model.onnx"
    spec = ort.opened(1).spec
    with pytest.raises(ConfigError, match="num_threads is 0, expected 1 or more"):
        open_backend(backend, path, spec, num_threads=0)
    with pytest.raises(ConfigError, match="device is 'gpu', expected 'cpu', 'cuda' or 'cuda:N'"):
        open_backend(backend, path, spec, device="gpu")
    with pytest.raises(IntegrityError, match=r"absent is not there, expected a (file|folder)"):
        open_backend(backend, path.parent / "absent", spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_device_that_is_not_here(backend: str, unet_bundle: Path, unet_checkpoint: Path, ort: Any) -> None:
    path = unet_checkpoint if backend == "torch" else unet_bundle / "onnx/fp32/1step/model.onnx"
    with pytest.raises(BackendUnavailable, match=r"device is 'cuda:1', but .* Use device='cpu'"):
        open_backend(backend, path, ort.opened(1).spec, device="cuda:1")


def test_onnxruntime_does_not_fall_back_in_silence(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library claims CUDA where there is none: it warns at most and runs on the CPU."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BackendUnavailable, match="expected CUDAExecutionProvider first: it fell back"):
            open_backend("onnxruntime", graph, SPEC, device="cuda")


@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
@pytest.mark.parametrize(
    ("written", "message"),
    [
        (SPEC.with_steps(1), "has inputs and output noise_0: .*; expected noise_0: .*noise_1"),
        (SamplerSpec(times=SPEC.times, sample_shape=(3, 4, 4), max_batch=4), "expected .*class_labels"),
        (
            SamplerSpec(times=SPEC.times, sample_shape=(3, 8, 4), num_classes=3, max_batch=4),
            r"\(batch, 3, 8, 4\)",
        ),
    ],
)
def test_a_graph_of_another_sampler_is_refused(
    tmp_path: Path, linear_graph: Any, backend: str, written: SamplerSpec, message: str
) -> None:
    linear_graph(tmp_path / "model.onnx", written)
    with pytest.raises(IntegrityError, match=message):
        open_backend(backend, tmp_path / "model.onnx", SPEC)


@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
def test_a_graph_must_carry_the_manifests_spec(backend: str, tmp_path: Path, linear_graph: Any) -> None:
    path = tmp_path / "model.onnx"
    linear_graph(path, SPEC, metadata="")
    with pytest.raises(IntegrityError, match="has no 'scm_spec' in its metadata"):
        open_backend(backend, path, SPEC)
    linear_graph(path, SPEC, metadata=SamplerSpec(times=(1.5, 1.0), sample_shape=(3, 4, 4), num_classes=3).to_json())
    with pytest.raises(IntegrityError, match=r"carries the spec .*1\.0.*, expected the manifest's .*1\.1"):
        open_backend(backend, path, SPEC)


@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
def test_a_damaged_graph_is_translated(backend: str, graph: Path) -> None:
    graph.write_bytes(graph.read_bytes()[:-30])
    with pytest.raises(IntegrityError, match=rf"{backend}( [\d.]+)? cannot load .*Export it again"):
        open_backend(backend, graph, SPEC)


def test_a_failing_run_is_translated(graph: Path, opened: Backend) -> None:
    backends = [open_backend("onnxruntime", graph, SPEC)]
    backends += [opened] if getattr(opened, "name", "") == "torch" else []
    for backend in backends:
        noise, _ = inputs(backend.spec)
        with pytest.raises(BackendFailure, match=r"failed on a batch of 2 on cpu: .*try a smaller batch_size"):
            backend.sample(noise, {"class_labels": np.array([0, 99])})


@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
def test_an_artifact_that_breaks_its_spec_is_caught(backend: str, graph: Path) -> None:
    opened: Any = open_backend(backend, graph, SPEC)
    opened.spec = SamplerSpec(times=SPEC.times, sample_shape=(3, 4, 4), output_shape=(3, 8, 8), num_classes=3)
    with pytest.raises(BackendFailure, match=r"returned \(2, 3, 4, 4\) float32, expected \(2, 3, 8, 8\)"):
        opened.sample(*inputs(SPEC))


def test_further_conditioning_reaches_the_graph(tmp_path: Path, linear_graph: Any) -> None:
    spec = SamplerSpec(times=(1.5,), sample_shape=(1, 2, 2), conditioning=(TensorSpec(name="prompt", shape=(7,)),))
    linear_graph(tmp_path / "model.onnx", spec)
    backend = open_backend("onnxruntime", tmp_path / "model.onnx", spec)
    noise = draw_noise(spec, [1, 2])
    assert backend.sample(noise, {"prompt": np.zeros((2, 7), np.float32)}).shape == (2, 1, 2, 2)
    with pytest.raises(ShapeError, match=r"prompt is \(2, 6\) float32, expected \(2, 7\) float32"):
        backend.sample(noise, {"prompt": np.zeros((2, 6), np.float32)})


def test_openvino_compiles_small_graphs_for_a_few_sizes_and_large_ones_once(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("scm_sdk.runtimes.openvino_backend")
    small: Any = open_backend("openvino", graph, SPEC)
    most = SPEC.max_batch
    by_batch = {batch: small.sample(*inputs(SPEC, batch)) for batch in range(1, most + 1)}
    assert set(small._compiled) <= set(module.FIXED_SIZES) and len(small._compiled) <= 3
    monkeypatch.setattr(module, "FIXED_BYTES", graph.stat().st_size - 1)
    large: Any = open_backend("openvino", graph, SPEC)
    for batch, images in by_batch.items():
        np.testing.assert_allclose(large.sample(*inputs(SPEC, batch)), images, rtol=0, atol=1e-6)
    assert list(large._compiled) == [0]


@pytest.mark.parametrize(
    ("batch", "most", "sizes"),
    [
        (1, 32, [1]), (2, 32, [1, 1]), (3, 32, [1, 1, 1]), (4, 32, [4]), (7, 32, [8]), (12, 32, [8, 4]),
        (17, 32, [16, 1]), (24, 32, [16, 8]), (28, 32, [32]), (32, 32, [32]), (5, 5, [4, 1]), (15, 15, [8, 8]),
    ],
)  # fmt: skip
def test_openvino_runs_a_batch_in_parts_of_those_sizes(batch: int, most: int, sizes: list[int]) -> None:
    module = pytest.importorskip("scm_sdk.runtimes.openvino_backend")
    assert module._sizes(batch, most) == sizes


def test_openvino_gives_each_picture_the_bits_of_its_single_call_whatever_the_batch(unet_bundle: Path) -> None:
    pytest.importorskip("openvino")
    with Generator.from_pretrained(unet_bundle, backend="openvino", num_threads=1) as gen:
        single = np.concatenate([gen(1, seed=seed, output_type="raw").images for seed in range(5)])
        for batch in range(1, 6):
            assert np.array_equal(gen(batch, seed=0, output_type="raw").images, single[:batch]), batch


@pytest.mark.parametrize(("cores", "num_threads", "streams"), [(4, 1, 4), (4, 2, 2), (2, 3, 1), (4, None, None)])
def test_openvino_has_a_stream_for_every_call_that_the_cores_hold(
    graph: Path, monkeypatch: pytest.MonkeyPatch, cores: int, num_threads: int | None, streams: int | None
) -> None:
    """It runs one call at a time in a stream: with fewer of them, callers would wait for one another."""
    monkeypatch.setattr("scm_sdk._util.processor.usable_cores", lambda: cores)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    backend: Any = open_backend("openvino", graph, SPEC, num_threads=num_threads)
    asked = {name: backend._settings.get(name) for name in ("NUM_STREAMS", "INFERENCE_NUM_THREADS")}
    if num_threads is None:
        assert asked == dict.fromkeys(asked), "the library's own choice"
    else:  # what it was asked for: it gives no more than this machine has
        assert streams is not None
        assert asked == {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams * num_threads}


def test_torch_leaves_the_threads_as_they_were(unet_checkpoint: Path, ort: Any) -> None:
    spec = ort.opened(1).spec
    before = torch.get_num_threads()
    backend = open_backend("torch", unet_checkpoint, spec, num_threads=before + 1)
    backend.sample(*inputs(spec))
    with pytest.raises(BackendFailure):
        backend.sample(inputs(spec)[0], {"class_labels": np.array([0, 99])})
    assert torch.get_num_threads() == before


def test_samplers_of_one_checkpoint_share_their_weights(unet_checkpoint: Path, tmp_path: Path, ort: Any) -> None:
    folder = Path(shutil.copytree(unet_checkpoint, tmp_path / "checkpoint"))
    one, two = (open_backend("torch", folder, ort.opened(steps).spec) for steps in (1, 2))
    model = one._sampler.model  # type: ignore[attr-defined]
    assert model is two._sampler.model  # type: ignore[attr-defined]
    assert not model.training
    os.utime(folder / WEIGHTS, ns=(1, 1))  # written again, by its time
    three = open_backend("torch", folder, ort.opened(1).spec)
    assert three._sampler.model is not model  # type: ignore[attr-defined]


def test_a_damaged_checkpoint_is_translated(unet_checkpoint: Path, tmp_path: Path, ort: Any) -> None:
    folder = Path(shutil.copytree(unet_checkpoint, tmp_path / "checkpoint"))
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match="truncated"):
        open_backend("torch", folder, ort.opened(1).spec)


@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
def test_graphs_run_without_torch(backend: str, unet_bundle: Path) -> None:
    code = (
        "import sys\n"
        "from scm_sdk import Generator\n"
        f"path, options = {str(unet_bundle)!r}, dict(backend={backend!r}, verify='full')\n"
        "with Generator.from_pretrained(path, **options) as gen:\n"
        "    for kind in ('pil', 'np', 'uint8', 'raw'): gen(2, seed=0, output_type=kind)\n"
        "    gen.plan(), gen.warmup()\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxscript'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
