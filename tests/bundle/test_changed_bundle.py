"""A model that is replaced or edited while it is open: what is loaded later is what was opened, or nothing."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from helpers.toy_bundles import write_linear_graph
from scm_sdk import Generator
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.errors import IntegrityError, ScmError
from scm_sdk.spec import SamplerSpec

TWO = SamplerSpec(times=(1.56, 1.1), sample_shape=(3, 4, 4), max_batch=4)
ONE = msgspec.structs.replace(TWO, times=(1.56,))
GRAPH = "onnx/fp32/1step/model.onnx"
CHANGED = "the bundle at .* was changed since it was opened; open it again"


def swap(path: Path, other: Path) -> None:
    """As a deployment does it: the new bundle is complete, then takes the place of the old one."""
    os.rename(path, path.with_name("old"))
    os.rename(other, path)


def edit(path: Path, other: Path) -> None:
    """Of the same size, at the same time, in the same file."""
    before = (path / GRAPH).stat()
    (path / GRAPH).write_bytes((other / GRAPH).read_bytes())
    os.utime(path / GRAPH, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(path: Path, other: Path) -> None:
    shutil.rmtree(path)


@pytest.fixture(params=["onnxruntime", "openvino"])
def gen(request: pytest.FixtureRequest, linear_bundle: Callable[..., Path]) -> Iterator[Generator]:
    """A generator that holds the 2-step graph; the 1-step graph is still on disk alone."""
    pytest.importorskip(request.param)
    path = linear_bundle(ONE, TWO)
    for file in path.rglob("*"):
        os.utime(file, (0, 0))
    with Generator.from_pretrained(path, backend=request.param, num_threads=1) as gen:
        yield gen


@pytest.fixture
def other(gen: Generator, linear_bundle: Callable[..., Path]) -> Path:
    return linear_bundle(ONE, TWO, name="other", gain=0.25)


LATER: dict[str, Callable[[Generator], object]] = {
    "call": lambda gen: gen(seed=1, num_inference_steps=1),
    "stream": lambda gen: list(gen.stream([{"num_inference_steps": 1}])),
    "batcher": lambda gen: gen.batcher().submit(num_inference_steps=1),
    "warmup": lambda gen: gen.warmup(num_inference_steps=1),
    "benchmark": lambda gen: gen.benchmark(num_inference_steps=1, rounds=2, warmup=0),
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("change", [swap, edit, remove])
def test_a_graph_that_is_opened_later_is_the_one_that_was_listed(
    change: Callable[[Path, Path], None], later: str, gen: Generator, other: Path
) -> None:
    before = gen(seed=1, output_type="raw")
    change(gen.source.path, other)
    with pytest.raises(IntegrityError, match=f"{CHANGED}. {GRAPH}"):
        LATER[later](gen)
    after = gen(seed=1, output_type="raw")
    assert after.info.build_id == before.info.build_id and np.array_equal(after.images, before.images)


@pytest.mark.parametrize("verify", ["digest", "none"])
def test_a_replaced_bundle_is_not_reopened_as_the_same(verify: str, gen: Generator, other: Path) -> None:
    swap(gen.source.path, other)
    with pytest.raises(IntegrityError, match=CHANGED):
        gen.reopen(num_threads=None, verify=verify)


def test_sizes_alone_do_not_make_another_manifest_the_same(linear_bundle: Callable[..., Path]) -> None:
    """Also where nothing is hashed, the manifest that is there now must list the same file."""
    path, other = linear_bundle(ONE, TWO), linear_bundle(ONE, TWO, name="other", gain=0.25)
    with Generator.from_pretrained(path, backend="onnxruntime", verify="none") as gen:
        swap(path, other)
        with pytest.raises(IntegrityError, match=CHANGED):
            gen(seed=1, num_inference_steps=1)


def test_an_extended_bundle_is_the_same_model(gen: Generator) -> None:
    """Old files keep their content; a further graph makes no other model."""
    with extend_bundle(gen.source.path) as draft:
        write_linear_graph(draft.path("onnx/fp16/1step/model.onnx"), ONE)
        draft.add(Artifact(path="onnx/fp16/1step/model.onnx", format="onnx", num_inference_steps=1), [])
    assert gen(seed=1, num_inference_steps=1).info.num_inference_steps == 1
    with gen.reopen(num_threads=None) as again:
        assert again.source.build_id != gen.source.build_id
        assert np.array_equal(again(seed=1, output_type="raw").images, gen(seed=1, output_type="raw").images)


def test_a_file_that_is_written_while_it_is_loaded_is_loaded_again(
    linear_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read between two writes is unknown, even if the file is right before and after."""
    from scm_sdk.inference import session

    path, loads = linear_bundle(TWO), list[Path]()
    real = session.open_backend

    def touched(name: str, artifact: Path, *args, **options):
        loads.append(artifact)
        if len(loads) <= times:
            os.utime(artifact)
        return real(name, artifact, *args, **options)

    monkeypatch.setattr(session, "open_backend", touched)
    times = 1
    with Generator.from_pretrained(path, backend="onnxruntime") as gen:
        assert len(gen(seed=1).images) == 1 and len(loads) == 2
    times, loads[:] = 9, []
    with pytest.raises(IntegrityError, match=r"was written while it was loaded, 3 times"):
        Generator.from_pretrained(path, backend="onnxruntime")


def test_what_was_hashed_is_hashed_again_only_after_a_change(
    linear_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scm_sdk.bundle import verify

    bundle = Bundle.open(linear_bundle(TWO))
    graph = bundle.path / "onnx/fp32/2step/model.onnx"
    hashed = list[Path]()
    real = verify.sha256_file
    monkeypatch.setattr(verify, "sha256_file", lambda path: hashed.append(path) or real(path))
    bundle.check_unchanged("onnx/fp32/2step/model.onnx")
    assert hashed == [graph], "a file as young as this may change again and show the same times"
    now = time.time_ns()
    monkeypatch.setattr(verify.time, "time_ns", lambda: now + 10**10)
    for _ in range(3):
        bundle.check_unchanged("onnx/fp32/2step/model.onnx")
    assert hashed == [graph] * 2
    os.utime(graph)
    bundle.check_unchanged("onnx/fp32/2step/model.onnx")
    assert hashed == [graph] * 3


def test_weights_that_training_replaces_are_not_run_as_those_before(unet_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(unet_checkpoint, tmp_path / "checkpoint"))
    weights = path / "diffusion_pytorch_model.safetensors"
    with Generator.from_pretrained(path) as gen:
        tensors = load_file(weights)
        save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, tmp_path / "new", metadata={"format": "pt"})
        os.replace(tmp_path / "new", weights)
        for later in (lambda: gen(seed=1, num_inference_steps=1), gen.reopen):
            with pytest.raises(ScmError, match="was changed since it was opened; open it again"):
                later()


def test_weights_edited_in_place_are_loaded_anew_by_who_opens_them_anew(unet_checkpoint: Path, tmp_path: Path) -> None:
    """Another generator in the process still holds the old ones; size and time of the file are the same."""
    from safetensors.torch import load_file, save

    path = Path(shutil.copytree(unet_checkpoint, tmp_path / "checkpoint"))
    weights = path / "diffusion_pytorch_model.safetensors"
    with Generator.from_pretrained(path) as gen:
        before, state = gen(seed=1, output_type="raw"), weights.stat()
        weights.write_bytes(save({name: tensor * 0.5 for name, tensor in load_file(weights).items()}, {"format": "pt"}))
        os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert weights.stat().st_size == state.st_size
        with Generator.from_pretrained(path) as new:
            after = new(seed=1, output_type="raw")
            assert after.info.build_id != before.info.build_id and not np.array_equal(after.images, before.images)
