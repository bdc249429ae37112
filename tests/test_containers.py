"""What a container meets: other users, no home, a read-only disk, a share of the processors."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from containers import run_python
from scm_sdk.archive import pack
from scm_sdk.errors import IntegrityError
from scm_sdk.extend import extend_bundle
from scm_sdk.generator import Generator
from scm_sdk.manifest import Artifact
from scm_sdk.measured import cache_path
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
    from scm_sdk.model.consistency import ConsistencyModel
    from scm_sdk.pickles import convert
    from scm_sdk.train.distributed import World
    from scm_sdk.train.sharded_state import save_run
    from test_run_state import fresh

    run = fresh(npz, tmp_path)
    with umask(mask):
        ConsistencyModel.from_pretrained(unet_checkpoint).save_pretrained(tmp_path / "out/checkpoint")
        toy.export(tmp_path / "out/bundle")
        with extend_bundle(tmp_path / "out/bundle") as draft:
            draft.path("onnx/fp16/1step/model.onnx").write_bytes(b"graph")
            draft.add(Artifact(path="onnx/fp16/1step/model.onnx", format="onnx", num_inference_steps=1), [])
        convert.convert_pickle(pkl, tmp_path / "out/imported")
        for sharded in (False, True):
            (tmp_path / f"out/run-{sharded}").mkdir()
            save_run(tmp_path / f"out/run-{sharded}", run.state, World(), sharded=sharded)
    found = modes(tmp_path / "out")
    assert set(found) == {expected}, found
    assert {"checkpoint/diffusion_pytorch_model.safetensors", "bundle/golden/golden.safetensors"} <= found[expected]


def test_what_is_not_opened_need_not_be_there(tmp_path: Path, unet_copy: Path) -> None:
    shutil.rmtree(unet_copy / "denoiser")
    with pytest.raises(IntegrityError, match=r"denoiser.*is missing"):
        Generator.from_pretrained(unet_copy, backend="onnxruntime")
    with Generator.from_pretrained(unet_copy, backend="onnxruntime", verify="none") as gen:
        assert len(gen(2, seed=1).images) == 2
    with pytest.raises(IntegrityError, match="denoiser is not there"):
        Generator.from_pretrained(unet_copy, backend="torch", verify="none")


@pytest.mark.parametrize("path, verify", [("denoiser/diffusion_pytorch_model.safetensors", "digest"), (GRAPH, "none")])
def test_an_unreadable_file_is_not_called_damaged(path: str, verify: str, unet_copy: Path) -> None:
    (unet_copy / path).chmod(0)
    done = run_python(
        "from scm_sdk import Generator\n"
        f"Generator.from_pretrained({str(unet_copy)!r}, verify={verify!r}, num_inference_steps=1, "
        "backend='onnxruntime')",
        unprivileged=True,
        env={"HOME": "/nowhere"},
    )
    said = done.stderr.strip().splitlines()[-1]
    assert "IntegrityError" in said and f"{path} cannot be read: Permission denied. Change its mode" in said


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
    # As other users see it. Drop the rights and keep what is open: the interpreter may lie where they cannot read.
    code = (
        "import scm_sdk.generator, scm_sdk.runtimes.ort_backend, importlib.metadata, os\n"
        "scm_sdk._lazy.require('onnxruntime', extra='', purpose='')\n"
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
        (key,) = json.loads(path.read_text())
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
            }[what]
        )
    start = time.process_time()
    with Generator.from_pretrained(bundle, backend="onnxruntime") as gen:
        assert all(row.measured is None for row in gen.plan())
    assert time.process_time() - start < 2


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
    assert "AF_INET" not in log.read_text(), "nobody was asked"
    assert [p for p in (tmp_path / "home").rglob("*") if p.is_file()] == []
