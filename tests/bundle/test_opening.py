"""Opening a model: what is hashed, when, and how often."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from helpers.toy_bundles import write_linear_graph
from scm_sdk import Generator
from scm_sdk._util import files
from scm_sdk.bundle import bundle as bundles
from scm_sdk.bundle import digest_cache, verify
from scm_sdk.bundle.bundle import Bundle, publish_bundle, write_bundle
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.errors import BackendFailure, IntegrityError
from scm_sdk.inference import session, sources
from scm_sdk.spec import SamplerSpec

SPEC = SamplerSpec(times=(1.56, 1.1), sample_shape=(3, 4, 4), max_batch=4)
GRAPH = "onnx/fp32/2step/model.onnx"
WEIGHTS = f"{GRAPH}_data"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A bundle whose weights are next to the graph, as those of a large model."""
    with publish_bundle(tmp_path / "large") as folder:
        write_linear_graph(folder / GRAPH, SPEC)
        model = onnx.load(folder / GRAPH)
        onnx.save(model, folder / GRAPH, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
        artifact = Artifact(path=GRAPH, format="onnx", num_inference_steps=2)
        write_bundle(folder, name="large", samplers=[SPEC], artifacts=[artifact])
    assert (tmp_path / "large" / WEIGHTS).stat().st_size
    return tmp_path / "large"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as young as those of a test may change again within the resolution of their times: let time pass."""
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 10**10)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read to be hashed, in order."""
    names: list[str] = []
    real = files.sha256_file
    for module in (verify, sources):
        monkeypatch.setattr(module, "sha256_file", lambda path: names.append(Path(path).name) or real(path))
    return names


def open_events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note when files were checked, and when a library opened and closed the model."""
    events: list[str] = []
    check, load = bundles.check_content, session.open_backend

    def checked(folder: Path, entry, **options):
        check(folder, entry, **options)
        events.append(f"checked {Path(entry.path).name}")

    def loaded(*args, **options):
        backend = load(*args, **options)
        events.append("loaded")
        real = backend.close
        backend.close = lambda: (events.append("closed"), real())
        return backend

    monkeypatch.setattr(bundles, "check_content", checked)
    monkeypatch.setattr(session, "open_backend", loaded)
    return events


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_weights_next_to_a_graph_are_checked_before_they_are_used(
    large: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend)
    events = open_events(monkeypatch)
    with Generator.from_pretrained(large, backend=backend) as gen:
        assert events[0] == "checked model.onnx" and sorted(events[1:]) == ["checked model.onnx_data", "loaded"]
        assert len(gen(2, seed=0).images) == 2


def test_altered_weights_next_to_a_graph_are_refused_and_the_model_is_closed(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = open_events(monkeypatch)
    data = np.fromfile(large / WEIGHTS, np.float32)
    (data * 2).tofile(large / WEIGHTS)
    with pytest.raises(IntegrityError, match=r"model\.onnx_data has sha256 .* expected"):
        Generator.from_pretrained(large, backend="onnxruntime")
    assert events.count("loaded") == events.count("closed") > 0


def test_damaged_weights_explain_what_the_library_says(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise BackendFailure("the library cannot load it.")

    monkeypatch.setattr(session, "open_backend", fail)
    with pytest.raises(BackendFailure, match="cannot load"):
        Generator.from_pretrained(large, backend="onnxruntime")
    (large / WEIGHTS).write_bytes(bytes(reversed((large / WEIGHTS).read_bytes())))
    with pytest.raises(IntegrityError, match=r"model\.onnx_data has sha256"):
        Generator.from_pretrained(large, backend="onnxruntime")


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS])
def test_a_library_gets_no_altered_graph_and_no_weights_of_another_size(
    large: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = open_events(monkeypatch)
    content = bytearray((large / name).read_bytes())
    if name == GRAPH:
        content[-1] ^= 1
    (large / name).write_bytes(content if name == GRAPH else content[:-4])
    with pytest.raises(IntegrityError, match=Path(name).name):
        Generator.from_pretrained(large, backend="onnxruntime")
    assert "loaded" not in events


@pytest.mark.usefixtures("later")
def test_a_file_is_hashed_once(large: Path, hashed: list[str]) -> None:
    bundle = Bundle.open(large, verify="digest")
    for threads in (1, 2):
        Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=threads).close()
    assert hashed.count("model.onnx") == hashed.count("model.onnx_data") == 1


@pytest.mark.usefixtures("later")
def test_the_weights_of_a_checkpoint_are_hashed_once(unet_checkpoint: Path, tmp_path: Path, hashed: list[str]) -> None:
    path = Path(shutil.copytree(unet_checkpoint, tmp_path / "checkpoint"))
    with Generator.from_pretrained(path) as gen:
        weights = "diffusion_pytorch_model.safetensors"
        assert hashed == [weights]
        os.utime(path / weights)
        gen(seed=0, num_inference_steps=1)
        assert hashed == [weights] * 2, "it was touched since"


@pytest.mark.usefixtures("later")
def test_only_who_asks_takes_an_earlier_digest(
    large: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCM_CACHE_DIR", str(tmp_path / "cache"))

    def opened(how: bundles.Verify) -> list[str]:
        hashed.clear()
        Generator.from_pretrained(large, backend="onnxruntime", verify=how).close()
        return sorted(set(hashed))

    both = ["model.onnx", "model.onnx_data"]
    assert opened("digest") == both and not (tmp_path / "cache/digests").exists()
    assert opened("remembered") == both, "nothing was remembered yet"
    assert opened("remembered") == []
    assert opened("digest") == both
    os.utime(large / WEIGHTS)
    assert opened("remembered") == ["model.onnx_data"]
    (large / WEIGHTS).write_bytes(bytes(reversed((large / WEIGHTS).read_bytes())))
    with pytest.raises(IntegrityError, match=r"model\.onnx_data has sha256"):
        opened("remembered")


@pytest.mark.usefixtures("later")
def test_an_earlier_digest_is_that_of_the_file_and_not_of_the_manifest(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCM_CACHE_DIR", str(tmp_path / "cache"))
    found = verify.stamp(large / GRAPH)
    digest_cache.remember_digest(large / GRAPH, found, "0" * 64)
    assert Bundle.open(large, verify="remembered").manifest
    assert digest_cache.recall_digest(large / GRAPH, found) == files.sha256_file(large / GRAPH)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": {"stamp": ["x"], "sha256": ""}}', b"[" * 99999])
def test_a_damaged_cache_of_digests_is_empty(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCM_CACHE_DIR", str(tmp_path / "cache"))
    digest_cache.remember_digest(tmp_path, (1, 2), "a")
    (kept,) = (tmp_path / "cache/digests").iterdir()
    kept.write_bytes(content)
    assert digest_cache.recall_digest(tmp_path, (1, 2)) == ""
    digest_cache.remember_digest(tmp_path, (1, 2), "b")
    assert digest_cache.recall_digest(tmp_path, (1, 2)) == "b"


def test_a_cache_of_digests_that_others_may_write_to_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCM_CACHE_DIR", str(tmp_path / "cache"))
    digest_cache.remember_digest(tmp_path, (1, 2), "a")
    (tmp_path / "cache/digests").chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written by other users"):
        assert digest_cache.recall_digest(tmp_path, (1, 2)) == ""


def test_the_digests_of_many_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "MAX_ENTRIES", 2)
    for i in range(3):
        digest_cache.remember_digest(tmp_path / str(i), (i, i), str(i))
    assert [digest_cache.recall_digest(tmp_path / str(i), (i, i)) for i in range(3)] == ["", "1", "2"]


def test_files_in_threads_are_like_files_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error by the order of the files is raised, whichever thread is faster."""
    monkeypatch.setattr(files, "usable_cores", lambda: 4)

    def check(number: int) -> int:
        if number in (3, 5):
            raise IntegrityError(f"file {number}")
        return number * 2

    for num_bytes in (0, 1 << 40):
        assert files.map_files(check, [0, 1, 2], num_bytes=num_bytes) == [0, 2, 4]
        with pytest.raises(IntegrityError, match="file 3"):
            files.map_files(check, range(100), num_bytes=num_bytes)
