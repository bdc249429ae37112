"""What a container meets: other users, no home, a read-only disk, a share of the processors."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from helpers.containers import run_python
from helpers.toy_bundles import write_linear_graph
from scm_sdk._util.files import sha256_file
from scm_sdk.bundle.archive import pack
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.bundle.manifest import Artifact, ParityRecord
from scm_sdk.bundle.scores import SCORES_PATH
from scm_sdk.errors import IntegrityError
from scm_sdk.inference import latency_cache
from scm_sdk.inference.generator import Generator, Verify
from scm_sdk.inference.latency_cache import cache_path
from scm_sdk.inference.sources import Source
from scm_sdk.spec import SamplerSpec

SPEC = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4))
GRAPH = "onnx/fp32/1step/model.onnx"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[int, set[str]]:
    """The modes of the files below a folder, each with the names of those that have it."""
    found: dict[int, set[str]] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found.setdefault(path.stat().st_mode & 0o777, set()).add(path.relative_to(folder).as_posix())
    return found


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read_what_is_written(
    mask: int, expected: int, tmp_path: Path, unet_checkpoint: Path, toy, npz, pkl
) -> None:
    from helpers.small_runs import fresh
    from scm_sdk.model.consistency import ConsistencyModel
    from scm_sdk.pickles import convert
    from scm_sdk.train.parallel.distributed import World
    from scm_sdk.train.parallel.sharded_state import save_run

    run = fresh(npz, tmp_path)
    with umask(mask):
        ConsistencyModel.from_pretrained(unet_checkpoint).save_pretrained(tmp_path / "out/checkpoint")
        toy.export(tmp_path / "out/bundle")
        with extend_bundle(tmp_path / "out/bundle") as draft:
            write_linear_graph(draft.path("onnx/fp16/1step/model.onnx"), toy.specs[0])
            draft.add(Artifact(path="onnx/fp16/1step/model.onnx", format="onnx", num_inference_steps=1), [])
        convert.convert_pickle(pkl, tmp_path / "out/imported")
        for sharded in (False, True):
            (tmp_path / f"out/run-{sharded}").mkdir()
            save_run(tmp_path / f"out/run-{sharded}", run.state, World(), sharded=sharded)
    found = modes(tmp_path / "out")
    assert set(found) == {expected}, found
    assert {"checkpoint/diffusion_pytorch_model.safetensors", "bundle/golden/golden.safetensors"} <= found[expected]


@pytest.mark.parametrize("verify", ["none", "digest", "full"])
def test_what_is_not_opened_need_not_be_there(verify: Verify, unet_copy: Path) -> None:
    """Neither the checkpoint nor the other graph; what is needed later is named then."""
    record = ParityRecord(artifact="onnx/fp32/2step/model.onnx", reference="denoiser", backend="onnxruntime",
                          threshold=1e-5, noise_floor=1e-6, max_abs=1e-6, num_samples=9, passed=True)  # fmt: skip
    Bundle.open(unet_copy).with_parity(record)
    weights = unet_copy / "denoiser/diffusion_pytorch_model.safetensors"
    weights.unlink()
    with Generator.from_pretrained(unet_copy, backend="onnxruntime", verify=verify) as gen:
        assert len(gen(2, seed=1).images) == 2
        with pytest.raises(IntegrityError, match=rf"{weights} is missing"):
            gen.reopen(backend="torch", verify="none" if verify == "none" else "digest")
    shutil.rmtree(unet_copy / "denoiser")
    (unet_copy / "onnx/fp32/1step/model.onnx").unlink()
    with Generator.from_pretrained(unet_copy, verify="none" if verify == "none" else "digest") as gen:
        assert gen.opened().row.backend == "onnxruntime", "auto chose what is there"
        with pytest.raises(IntegrityError, match=r"1step.model\.onnx is missing"):
            gen.reopen(backend="onnxruntime", num_inference_steps=1)
    with pytest.raises(IntegrityError, match=r"denoiser.*is missing"):
        Bundle.open(unet_copy)


def test_only_what_is_opened_is_hashed(monkeypatch: pytest.MonkeyPatch, unet_copy: Path) -> None:
    hashed: list[str] = []

    def note(path: str | os.PathLike[str]) -> str:
        hashed.append(Path(path).relative_to(unet_copy).as_posix())
        return sha256_file(path)

    monkeypatch.setattr("scm_sdk.bundle.verify.sha256_file", note)
    with Generator.from_pretrained(unet_copy, backend="onnxruntime") as gen:
        assert set(hashed) == {"onnx/fp32/2step/model.onnx"}
        gen(1, seed=1)
        gen.benchmark(rounds=2, warmup=0)
        gen(1, seed=1, num_inference_steps=1)
        assert set(hashed) == {"onnx/fp32/1step/model.onnx", "onnx/fp32/2step/model.onnx"}
    hashed.clear()
    Bundle.open(unet_copy)
    assert sorted(hashed) == sorted(entry.path for entry in Bundle.open(unet_copy, verify="none").manifest.files)


def test_scores_are_checked_where_they_are(linear_bundle: Callable[..., Path]) -> None:
    """They are read when a bundle is opened; other reports are not."""
    path = linear_bundle(SPEC)
    with extend_bundle(path) as draft:
        for name in ("quality", "parity"):
            draft.path(f"reports/{name}.json").write_bytes(b"[]")
    (path / "reports/parity.json").unlink()
    Generator.from_pretrained(path, backend="onnxruntime").close()
    (path / SCORES_PATH).write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=r"quality.json has sha256 .* altered"):
        Generator.from_pretrained(path, backend="onnxruntime")
    (path / SCORES_PATH).unlink()
    with Generator.from_pretrained(path, backend="onnxruntime") as gen:
        assert not gen.source.status.quality_measured


def test_a_bundle_that_is_replaced_while_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, linear_bundle: Callable[..., Path]
) -> None:
    """Another process publishes between the reading of the manifest and that of the graph: the new one is opened."""
    path, spec = linear_bundle(SPEC), Source.spec
    newer = linear_bundle(SPEC, name="newer", gain=0.25)

    def publish(source: Source, steps: int, *, unrolled: bool) -> SamplerSpec:
        if newer.exists():
            shutil.rmtree(path)
            newer.rename(path)
        return spec(source, steps, unrolled=unrolled)

    monkeypatch.setattr(Source, "spec", publish)
    with Generator.from_pretrained(path, backend="onnxruntime") as gen:
        assert gen.source.build_id == Bundle.open(path).manifest.build_id
        noise = np.ones((1, *SPEC.sample_shape), np.float32)
        np.testing.assert_array_equal(gen(1, noise=[noise], output_type="raw").images, noise * 0.25)


@pytest.mark.parametrize("verify", ["digest", "none"])
def test_an_unreadable_file_is_not_called_damaged(verify: str, unet_copy: Path) -> None:
    (unet_copy / GRAPH).chmod(0)
    done = run_python(
        "from scm_sdk import Generator\n"
        f"Generator.from_pretrained({str(unet_copy)!r}, verify={verify!r}, num_inference_steps=1, "
        "backend='onnxruntime')",
        unprivileged=True,
        env={"HOME": "/nowhere"},
    )
    said = done.stderr.strip().splitlines()[-1]
    assert "IntegrityError" in said and f"{GRAPH} cannot be read: Permission denied. Change its mode" in said


RUN = "from scm_sdk import Generator; g = Generator.from_pretrained({!r}, backend='onnxruntime'); g(1, seed=1); "
HOMES = ["none", "a file", "read-only", "not there", "relative"]


@pytest.fixture
def homeless(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a process without a usable home."""
    home = tmp_path / "home"
    if request.param == "a file":
        home.write_bytes(b"")
    elif request.param == "read-only":
        home.mkdir()
        home.chmod(0o555)
    named = {"none": None, "not there": "/proc/nobody", "relative": "home"}.get(request.param, str(home))
    return {} if named is None else {"HOME": named}


@pytest.mark.parametrize("homeless", HOMES, indirect=True)
def test_a_folder_is_opened_in_silence_whatever_the_home(
    homeless: dict[str, str], linear_bundle: Callable[..., Path]
) -> None:
    code = RUN.format(str(linear_bundle(SPEC))) + "print(g.plan().chosen.backend)"
    done = run_python(code, env=homeless, unprivileged=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "onnxruntime\n", "")


@pytest.mark.parametrize("homeless", HOMES, indirect=True)
def test_a_measurement_is_returned_and_one_warning_says_that_it_is_not_kept(
    homeless: dict[str, str], linear_bundle: Callable[..., Path]
) -> None:
    code = RUN.format(str(linear_bundle(SPEC))) + "print(len(g.benchmark(rounds=2, warmup=0))); g.benchmark(rounds=2)"
    done = run_python(code, env=homeless, unprivileged=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert done.stderr.count("RuntimeWarning: the measured latencies are not kept") == 1
    assert "Set SCM_CACHE_DIR to a folder" in done.stderr


@pytest.mark.parametrize("homeless", HOMES, indirect=True)
def test_an_archive_is_unpacked_where_that_works(
    homeless: dict[str, str], tmp_path: Path, linear_bundle: Callable[..., Path]
) -> None:
    archive = pack(linear_bundle(SPEC), tmp_path / "m.scmz")
    env = homeless | {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    done = run_python(RUN.format(str(archive)) + "print('ran')", env=env, unprivileged=True)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    assert "is unpacked to a temporary folder" in done.stderr and "SCM_CACHE_DIR" in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == [], "the process takes it away"
    done = run_python(RUN.format(str(archive)), env=env | {"SCM_CACHE_DIR": str(tmp_path / "cache")}, unprivileged=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_any_disk_the_error_names_the_variable(tmp_path: Path, linear_bundle: Callable[..., Path]) -> None:
    archive = pack(linear_bundle(SPEC), tmp_path / "m.scmz")
    code = f"import tempfile; tempfile.tempdir = '/proc'; {RUN.format(str(archive))}"
    done = run_python(code, unprivileged=True)
    assert "BundleError: no temporary folder can be made" in done.stderr and "Set SCM_CACHE_DIR" in done.stderr


def test_a_cache_that_root_filled_in_an_image(tmp_path: Path, linear_bundle: Callable[..., Path]) -> None:
    """The user may read it and not write it; nothing is unpacked again."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    archive = pack(linear_bundle(SPEC), top / "m.scmz")
    env = {"SCM_CACHE_DIR": str(top / "cache"), "HOME": "/nowhere"}
    assert run_python(RUN.format(str(archive)), env=env).returncode == 0
    # As other users see it. Drop the rights and keep what is open: the interpreter may be where they cannot read.
    code = (
        "import scm_sdk.inference.generator, scm_sdk.runtimes.ort_backend, importlib.metadata, os\n"
        "scm_sdk._util.lazy.require('onnxruntime', extra='', purpose='')\n"
        f"os.setgid(54321); os.setuid(54321)\n{RUN.format(str(archive))}print(g.source.path)"
    )
    done = run_python(code, env=env | {"PYTHONWARNINGS": "error"})
    shutil.rmtree(top)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(str(top / "cache")), done.stderr


@pytest.mark.parametrize("what", ["deep", "huge", "fifo", "many", "negative", "nan", "zero", "text", "list", "folder"])
def test_a_damaged_latency_cache_counts_as_empty_and_costs_nothing(
    what: str, cache_home: Path, linear_bundle: Callable[..., Path]
) -> None:
    bundle = linear_bundle(SPEC)
    with Generator.from_pretrained(bundle, backend="onnxruntime") as gen:
        gen.benchmark(rounds=2, warmup=0)
        path = cache_path()
        assert path is not None
        (key,) = json.loads(path.read_text("utf-8"))
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.write_text(
            {
                "deep": "[" * 200_000,
                "huge": '"' + "x" * 50_000_000 + '"',
                "many": json.dumps({f"onnxruntime|{i}": [1.0, 1] for i in range(300_000)}),
                "negative": json.dumps({key: [-5.0, 1]}),
                "nan": '{"' + key + '": [NaN, 1]}',
                "zero": json.dumps({key: [1.0, 0]}),
                "text": "not json",
                "list": "[1]",
            }[what],
            encoding="utf-8",
        )
    with pytest.warns(RuntimeWarning, match=r"latency\.json is ignored: it .* Delete it") as caught:
        for _ in range(3):
            with Generator.from_pretrained(bundle, backend="onnxruntime") as gen:
                assert all(row.measured is None for row in gen.plan())
    assert len(caught) == 1


def test_a_thousand_remembered_latencies_are_looked_through_once(
    monkeypatch: pytest.MonkeyPatch, linear_bundle: Callable[..., Path]
) -> None:
    """What a machine and a library are is asked once for each backend, whatever the file names."""
    bundle, asked = linear_bundle(SPEC), []
    with Generator.from_pretrained(bundle, backend="onnxruntime") as gen:
        gen.benchmark(rounds=2, warmup=0)
    path = cache_path()
    assert path is not None
    ((key, value),) = json.loads(path.read_text("utf-8")).items()
    others = {f"onnxruntime|{i}|{key}": value for i in range(500)} | {f"library{i}|{key}": value for i in range(499)}
    path.write_text(json.dumps(others | {key: value}), encoding="utf-8")
    real = latency_cache.distribution_version
    monkeypatch.setattr(latency_cache, "distribution_version", lambda *names: asked.append(names[0]) or real(*names))
    with Generator.from_pretrained(bundle, backend="onnxruntime") as gen:
        assert gen.opened().row.measured is not None
    assert asked == ["onnxruntime"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_no_library_reports_its_use(backend: str, tmp_path: Path, linear_bundle: Callable[..., Path]) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    pytest.importorskip(backend)
    code = RUN.format(str(linear_bundle(SPEC))).replace("onnxruntime", backend) + "import time; time.sleep(1)"
    (tmp_path / "home").mkdir()
    env, log = {"HOME": str(tmp_path / "home")}, tmp_path / "strace.txt"
    watch = ["strace", "-f", "-e", "trace=connect,sendto", "-o", str(log)]
    done = run_python(code, env=env, under=watch)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "AF_INET" not in log.read_text("utf-8"), "no network was used"
    assert [p for p in (tmp_path / "home").rglob("*") if p.is_file()] == []
