"""What a newcomer types first: wrong names, printed objects, a measurement that counts at once."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scm_sdk.bundle.manifest import ParityRecord
from scm_sdk.errors import ConfigError, UnknownArgument
from scm_sdk.inference import latency_cache
from scm_sdk.inference.generator import Generator, OpenOptions
from scm_sdk.inference.request import MAX_IMAGES, make_request
from scm_sdk.spec import SamplerSpec, TensorSpec

SPEC = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4), num_classes=3, class_names=("red", "2", "blue"))
GRAPH = "onnx/fp32/1step/model.onnx"


@pytest.fixture
def bundle(linear_bundle: Callable[..., Path]) -> Path:
    """A bundle whose graph passed with both CPU libraries."""
    return linear_bundle(
        SPEC,
        parity=[
            ParityRecord(artifact=GRAPH, reference="denoiser", backend=backend, threshold=1, noise_floor=0, max_abs=0,
                         num_samples=4, passed=True)
            for backend in ("onnxruntime", "openvino")
        ],
    )  # fmt: skip


@pytest.fixture
def gen(bundle: Path):
    with Generator.from_pretrained(bundle, backend="onnxruntime") as gen:
        yield gen


@pytest.mark.parametrize(
    "call, of, nearest",
    [
        (lambda gen: gen.benchmark(bacth=8), "benchmark", "batch"),
        (lambda gen: gen(num_image=4), "the generator", "num_images"),
        (lambda gen: gen.batcher(max_queue_sise=4), "batcher", "max_queue_size"),
        (lambda gen: gen.compare(gen, treshold=1), "compare", "threshold"),
        (lambda gen: gen.plan(num_steps=1), "plan", "num_inference_steps"),
        (lambda gen: gen.warmup(num_image=1), "warmup", "num_images"),
        (lambda gen: Generator.from_pretrained(gen.source.path, bakend="torch"), "from_pretrained", "backend"),
        (lambda gen: gen.reopen(bakend="torch"), "reopen", "backend"),
        (lambda gen: gen.batcher().submit(sed=3), "submit", "seed"),
        (lambda gen: gen.batcher()(class_label=2), "batcher", "class_labels"),
        (lambda gen: next(gen.stream([{"outputtype": "raw"}])), "stream", "output_type"),
    ],
)
def test_a_wrong_name_is_answered_by_the_function_with_the_nearest(call, of: str, nearest: str, gen) -> None:
    with pytest.raises(UnknownArgument, match=rf"^{of} got '\w+', .*Did you mean {nearest}\?") as raised:
        call(gen)
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize("make", [lambda: Generator("model"), lambda: Generator(), lambda: Generator(path="model")])
def test_the_class_itself_opens_nothing_and_says_what_does(make) -> None:
    with pytest.raises(UnknownArgument, match=r"expected Generator\.from_pretrained\(path\)") as raised:
        make()
    assert isinstance(raised.value, TypeError)


def test_reopen_may_change_what_from_pretrained_takes() -> None:
    parameters = inspect.signature(Generator.from_pretrained).parameters
    known = {name: p.annotation for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert known.pop("revision") and known.pop("local_files_only"), "they say where the model is, not how it runs"
    assert {name: annotation.__forward_arg__ for name, annotation in OpenOptions.__annotations__.items()} == known


def test_a_name_near_to_none_lists_them_all(gen: Generator) -> None:
    with pytest.raises(ConfigError, match=r"batcher got 'qqq'.*num_images, class_labels"):
        gen.batcher()(qqq=2)


@pytest.mark.parametrize("requests", [[1], ["seed"], {"seed": 1}])
def test_a_stream_of_what_is_no_request(requests, gen: Generator) -> None:
    with pytest.raises(ConfigError, match=r"stream got a (int|str), expected a mapping"):
        list(gen.stream(requests))


def test_a_batcher_is_called_like_a_generator(gen: Generator) -> None:
    with gen.batcher() as batcher:
        for out in (batcher(2, seed=1, output_type="raw"), batcher.submit(2, seed=1, output_type="raw").result()):
            assert np.array_equal(out.images, gen(2, seed=1, output_type="raw").images)


def test_a_text_is_a_name_first_and_then_a_number(gen: Generator) -> None:
    found = [gen(1, class_labels=label, seed=1).class_labels for label in ("red", "2", 2, "0")]
    assert found == [(0,), (1,), (2,), (0,)]
    for wrong in ("3", "-1", "1.0", "\u0662", "9" * 5000, " 2", "", b"red"):
        with pytest.raises(ConfigError, match="class label is"):
            gen(1, class_labels=wrong)


def test_arrays_without_axes_are_numbers(gen: Generator) -> None:
    out = gen(2, seed=np.array(5), class_labels=np.array(1))
    assert out.seeds == (5, 6) and out.class_labels == (1, 1)
    assert gen(1, seed=np.array([5]), class_labels=np.array("blue")).class_labels == (2,)


@pytest.mark.parametrize("wrong", ["4", ["4"], [1, "4"], b"4", True, [True], [[4]], [1, [2]], [], {}, 1e300, 2 + 0j])
def test_a_guidance_scale_is_a_number(wrong) -> None:
    spec = msgspec.structs.replace(SPEC, guidance_range=(1.0, 8.0))
    with pytest.raises(ConfigError, match="guidance_scale"):
        make_request(spec, seed=1, guidance_scale=wrong)
    for right in (4, np.array(4), np.float16(4), [4.0], np.array([4])):
        scale = make_request(spec, seed=1, guidance_scale=right).conditioning["guidance_scale"]
        assert scale.dtype == np.float32 and scale.tolist() == [4]


@pytest.mark.parametrize("name", ["batch_size", "events"])
def test_what_shared_batches_cannot_have_is_said(name: str, gen: Generator) -> None:
    with gen.batcher() as batcher:
        for call in (batcher, batcher.submit, lambda **options: next(gen.stream([options]))):
            with pytest.raises(UnknownArgument, match=f"got '{name}', which only a single call takes.* max_batch"):
                call(**{name: 2})


def test_giant_requests_are_refused_before_anything_is_built(gen: Generator) -> None:
    with pytest.raises(ConfigError, match=rf"num_images is 1000000000, expected at most {MAX_IMAGES}"):
        gen(10**9)
    large = msgspec.structs.replace(SPEC, sample_shape=(3, 1024, 1024), num_classes=0, class_names=())
    with pytest.raises(ConfigError, match="num_images is 342, expected at most 341"):
        make_request(large, num_images=342)
    assert len(make_request(large, num_images=341)) == 341
    words = TensorSpec(name="prompt_embeds", shape=(300, 2304))
    with pytest.raises(ConfigError, match="expected at most 1553 in one request"):
        make_request(msgspec.structs.replace(SPEC, conditioning=(words,)), num_images=10**4)
    with gen.batcher(max_queue_size=8) as batcher:
        for call in (batcher, batcher.submit):
            with pytest.raises(ConfigError, match="num_images is 1000000000"):
                call(10**9)
            with pytest.raises(ConfigError, match=r"num_images is 1000, expected at most \d+ in one request"):
                call(1000, timeout=0)


def test_what_is_printed_is_short(gen: Generator) -> None:
    out = gen(20, seed=1)
    assert str(out).startswith("20 images by onnxruntime fp32 on cpu, 1 step, ") and "seeds 1, 2, 3" in str(out)
    assert len(str(out)) < 300 and "1 image by" in str(gen(1))
    latency = gen.benchmark(rounds=3, warmup=0)
    assert len(str(latency).splitlines()) == 3 and f"onnxruntime:{GRAPH}" in str(latency) and len(str(latency)) < 400
    assert repr(gen).endswith("linear: onnxruntime fp32 of 1 steps on cpu>")
    with gen.reopen() as closed:
        pass
    assert repr(closed).endswith("not open here>")


def test_a_measurement_counts_for_the_generator_that_made_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    with Generator.from_pretrained(bundle) as gen:
        first = gen.opened().row.backend
        other = {"onnxruntime": "openvino", "openvino": "onnxruntime"}[first]
        images = gen(3, seed=1, output_type="raw").images
        gen.benchmark(rounds=3, warmup=0, batch=2)
        assert all(row.measured is not None and row.measured.batch == 2 for row in gen.plan().accepted)
        assert gen.opened().row == gen.plan().chosen
        # The same with times that choose the other one, as if this machine were another.
        rows = {row.key: row.measured for row in gen.plan().accepted}
        times = {key: latency_cache.Measured(1.0 if key[0] == other else 9.0, 2) for key in rows}
        gen._opener.remember(times, 1)
        assert gen.opened().row.backend == other and gen.plan().chosen == gen.opened().row
        assert gen(3, seed=1).info.backend == other
        assert np.allclose(gen(3, seed=1, output_type="raw").images, images, atol=1e-5)
    path = latency_cache.cache_path()
    assert path is not None and len(json.loads(path.read_bytes())) == 2


def test_a_named_backend_stays_and_its_plan_shows_the_time(gen: Generator) -> None:
    gen.benchmark(rounds=3, warmup=0)
    assert "measured here" in str(gen.plan()) and gen.opened().row.backend == "onnxruntime"
