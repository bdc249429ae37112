"""Batch generation: shards that any rerun reproduces, kills, resumes, merging, damage."""

import hashlib
import io
import json
import os
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from scm_sdk._util.events import EventLines, Silent
from scm_sdk._util.lazy import is_installed
from scm_sdk.errors import BackendFailure, BackendUnavailable, BundleError, ConfigError, IntegrityError
from scm_sdk.export.cli import main
from scm_sdk.inference.generator import Generator
from scm_sdk.scale import run
from scm_sdk.scale.plan import PROMPTS_NAME, SHARD_FORMATS, SamplePlan, make_plan, read_plan, start_or_resume
from scm_sdk.scale.run import Worker, run_local
from scm_sdk.scale.shards import merge, missing_shards, read_shard, record_name, shard_name
from scm_sdk.scale.store import Store


@pytest.fixture(scope="module")
def plan(unet_bundle: Path) -> SamplePlan:
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_inference_steps=1) as gen:
        return make_plan(gen, num_images=11, shard_size=4, seed=100)


@pytest.fixture(scope="module")
def whole(unet_bundle: Path, plan: SamplePlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, written by this process."""
    out = tmp_path_factory.mktemp("samples")
    start_or_resume(Store(out), plan)
    written: list[str] = []
    assert run_local(Worker(bundle=str(unet_bundle), out=str(out), plan=plan), events=EventLines(written.append)) == 3
    assert written == ["1 of 3: shard 0", "2 of 3: shard 1", "3 of 3: shard 2"] and not missing_shards(Store(out), plan)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_are_those_of_single_calls(unet_bundle: Path, whole: Path, plan: SamplePlan) -> None:
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_inference_steps=1) as gen:
        for shard in range(3):
            pixels, record = read_shard(Store(whole), plan, shard)
            for array, image in zip(pixels, record.images, strict=True):
                alone = gen(1, seed=image.seed, output_type="uint8")
                np.testing.assert_array_equal(alone.images[0], array)
                assert alone.class_labels == (image.class_label,)
    assert [image.seed for image in record.images] == [108, 109, 110], "the last shard holds what is left"


def test_shard_is_a_web_dataset(whole: Path, plan: SamplePlan) -> None:
    with tarfile.open(whole / shard_name(plan, 1)) as archive:
        assert archive.getnames()[:3] == ["0000000004.png", "0000000004.json", "0000000004.cls"]
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}
        content = archive.extractfile("0000000004.png")
        assert content is not None
        with Image.open(io.BytesIO(content.read())) as picture:
            assert picture.size == (plan.shape[1], plan.shape[0])


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 2, 0]])
def test_bytes_do_not_depend_on_who_writes_what_when(
    unet_bundle: Path, whole: Path, plan: SamplePlan, tmp_path, order
) -> None:
    """Jobs of an array, each with its own process and its own shard, in any order and twice."""
    for shard in order:
        start_or_resume(Store(tmp_path), plan)
        run_local(Worker(bundle=str(unet_bundle), out=str(tmp_path), plan=plan), [shard])
    assert files(tmp_path) == files(whole)


def test_processes_of_a_pool_write_the_same(unet_bundle: Path, whole: Path, plan: SamplePlan, tmp_path: Path) -> None:
    start_or_resume(Store(tmp_path), plan)
    assert run_local(Worker(bundle=str(unet_bundle), out=str(tmp_path), plan=plan), workers=2) == 3
    assert files(tmp_path) == files(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_command_is_resumed_by_the_same_command(
    unet_bundle: Path, whole: Path, plan: SamplePlan, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "scm_sdk.export.cli", "sample", str(unet_bundle), "-o", str(tmp_path), "--num-images",
        "11", "--shard-size", "4", "--seed", "100", "--backend", "onnxruntime", "--steps", "1", "--json",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (tmp_path / record_name(0)).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert json.loads(done.stdout)["complete"] == 3
    there = {name: data for name, data in files(tmp_path).items() if ".partial" not in name}
    assert there == files(whole)


def test_killed_worker_loses_nothing(unet_bundle: Path, whole: Path, plan: SamplePlan, tmp_path, monkeypatch) -> None:
    start_or_resume(Store(tmp_path), plan)
    killed: list[int] = []
    pool_of = run.ProcessPoolExecutor

    def remember(*args: object, **options: object) -> object:
        pool = pool_of(*args, **options)  # type: ignore[arg-type]
        pools.append(pool)
        return pool

    pools: list[run.ProcessPoolExecutor] = []
    monkeypatch.setattr(run, "ProcessPoolExecutor", remember)

    class Kill(Silent):
        def step(self, text: str, done: int, total: int, /) -> None:
            if not killed:
                killed.extend(pools[0]._processes)
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

    assert run_local(Worker(bundle=str(unet_bundle), out=str(tmp_path), plan=plan), workers=2, events=Kill()) == 3
    assert killed and files(tmp_path) == files(whole)


def test_workers_that_always_die_are_given_up(unet_bundle: Path, plan: SamplePlan, tmp_path: Path, monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise run.BrokenProcessPool("terminated abruptly")

    start_or_resume(Store(tmp_path), plan)
    monkeypatch.setattr(run, "_run_pool", broken)
    with pytest.raises(BackendFailure, match=r"died 3 times .*fewer workers"):
        run_local(Worker(bundle=str(unet_bundle), out=str(tmp_path), plan=plan), workers=2)


def test_errors_of_a_worker_are_its_own(unet_bundle: Path, plan: SamplePlan, tmp_path: Path) -> None:
    start_or_resume(Store(tmp_path), plan)
    with pytest.raises(BundleError, match="nowhere"):
        run_local(Worker(bundle=str(tmp_path / "nowhere"), out=str(tmp_path), plan=plan), workers=2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
def test_run_that_stalls_is_given_up(unet_bundle: Path, plan: SamplePlan, tmp_path: Path) -> None:
    """The workers wait for a file of prompts that is never written, as they would for storage that hangs."""
    stalled = msgspec.structs.replace(plan, num_prompts=1)
    start_or_resume(Store(tmp_path), stalled)
    os.mkfifo(tmp_path / PROMPTS_NAME)
    with pytest.raises(BackendFailure, match=r"no shard was finished for 0 s.*--stall-timeout"):
        run_local(Worker(bundle=str(unet_bundle), out=str(tmp_path), plan=stalled), workers=2, stall_seconds=0.01)


@pytest.mark.parametrize("format", SHARD_FORMATS)
def test_merged_file_is_read_by_numpy(unet_bundle: Path, tmp_path: Path, format) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow")
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_inference_steps=1) as gen:
        plan = make_plan(gen, num_images=5, shard_size=2, class_labels=[1, 0], format=format)
        wanted = gen(5, seed=0, class_labels=[1, 0, 1, 0, 1], output_type="uint8").images
    out = str(tmp_path / "samples")
    start_or_resume(Store(out), plan)
    run_local(Worker(bundle=str(unet_bundle), out=out, plan=plan))
    read: list[str] = []
    merge(Store(out), tmp_path / "all.npz", events=EventLines(read.append))
    assert read == ["2 of 5: images", "4 of 5: images", "5 of 5: images"]
    with np.load(tmp_path / "all.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], wanted)
        assert arrays["arr_1"].tolist() == [1, 0, 1, 0, 1]


@pytest.fixture(scope="module")
def table(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SamplePlan]:
    """A finished run of one Parquet shard, and its plan."""
    pytest.importorskip("pyarrow")
    out = tmp_path_factory.mktemp("table")
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_inference_steps=1) as gen:
        plan = make_plan(gen, num_images=101, seed=2**64 - 200, format="parquet")
    start_or_resume(Store(out), plan)
    assert run_local(Worker(bundle=str(unet_bundle), out=str(out), plan=plan)) == 1
    return out, plan


def test_parquet_shards_have_the_same_bytes_again_and_a_row_for_each_image(
    unet_bundle: Path, table: tuple[Path, SamplePlan], tmp_path: Path
) -> None:
    import pyarrow.parquet as parquet

    out, plan = table
    start_or_resume(Store(tmp_path), plan)
    assert run_local(Worker(bundle=str(unet_bundle), out=str(tmp_path), plan=plan), [0], workers=2) == 1
    assert files(tmp_path) == files(out)
    pixels, record = read_shard(Store(out), plan, 0)
    file = parquet.ParquetFile(out / shard_name(plan, 0))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [100, 1]
    rows = file.read().to_pylist()
    assert [(row["seed"], row["class_label"], row["sha256"]) for row in rows] == [
        (image.seed, image.class_label, image.sha256) for image in record.images
    ]
    assert rows[100]["image"]["path"] == "0000000100.png"
    with Image.open(io.BytesIO(rows[100]["image"]["bytes"])) as picture:
        np.testing.assert_array_equal(np.asarray(picture).reshape(plan.shape), pixels[100])


def test_parquet_shards_are_datasets_of_pictures(table: tuple[Path, SamplePlan], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face's reader is no part of an extra")
    out, plan = table
    data = datasets.Dataset.from_parquet(str(out / shard_name(plan, 0)), cache_dir=str(tmp_path))
    assert data[3]["image"].size == (plan.shape[1], plan.shape[0])
    assert (data[3]["seed"], len(data)) == (plan.first_seed + 3, 101)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "zstd"}, "is compressed"),
        ({"use_dictionary": True}, "is compressed"),
        ({"rows": 102}, "102 rows"),
        ({"columns": ["seed"]}, "cannot be read"),
        ({"image": {"bytes": None, "path": "x"}}, "x is no picture"),
        ({"image": None}, "cannot be read"),
    ],
)
def test_parquet_shards_of_others_are_refused(table: tuple[Path, SamplePlan], tmp_path: Path, options, message) -> None:
    """Their records fit them: who can change a shard can change its record."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    out, plan = table
    shutil.copytree(out, tmp_path / "x")
    path = tmp_path / "x" / shard_name(plan, 0)
    data = parquet.read_table(path)
    rows = data.to_pylist()[:1] * options.get("rows", 101)
    if "image" in options:
        rows = [row | {"image": options["image"]} for row in rows]
    data = pa.Table.from_pylist(rows, data.schema).select(options.get("columns", data.column_names))
    plain = {"compression": "none", "use_dictionary": False}
    parquet.write_table(data, path, **plain | {name: options[name] for name in options if name in plain})
    seal(tmp_path / "x", plan, 0)
    with pytest.raises(IntegrityError, match=message):
        merge(Store(tmp_path / "x"), None)


def seal(out: Path, plan: SamplePlan, shard: int) -> None:
    """Let the record of a changed shard say what the shard now holds."""
    data = (out / shard_name(plan, shard)).read_bytes()
    record = json.loads((out / record_name(shard)).read_bytes())
    record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (out / record_name(shard)).write_text(json.dumps(record), encoding="utf-8")


def test_parquet_without_its_library_is_refused(unet_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with (
        Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_inference_steps=1) as gen,
        pytest.raises(BackendUnavailable, match=r"parquet.* needs pyarrow.*Install it with"),
    ):
        make_plan(gen, num_images=1, format="parquet")


def test_pictures_of_others_are_refused(whole: Path, plan: SamplePlan, tmp_path: Path) -> None:
    """A PNG file of a few bytes may say that it has 10^9 pixels."""
    shutil.copytree(whole, tmp_path / "x")
    header = b"IHDR" + struct.pack(">IIBBBBB", 1 << 15, 1 << 15, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header))
    with tarfile.open(tmp_path / "x" / shard_name(plan, 0), "w") as archive:
        for number in range(4):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(bomb)
            archive.addfile(member, io.BytesIO(bomb))
    seal(tmp_path / "x", plan, 0)
    with pytest.raises(IntegrityError, match=r"0\.png is no picture"):
        merge(Store(tmp_path / "x"), None)


def test_object_store_holds_the_same(unet_bundle: Path, whole: Path, plan: SamplePlan) -> None:
    fsspec = pytest.importorskip("fsspec")
    url = "memory://bucket/samples"
    start_or_resume(Store(url), plan)
    assert run_local(Worker(bundle=str(unet_bundle), out=url, plan=plan)) == 3
    assert run_local(Worker(bundle=str(unet_bundle), out=url, plan=plan)) == 0
    fs = fsspec.filesystem("memory")
    found = {path.removeprefix("/bucket/samples/"): fs.cat_file(path) for path in fs.find("/bucket/samples")}
    assert found == files(whole)
    merge(Store(url), None)
    with pytest.raises(BundleError, match="samples cannot be read"), Store(url).reading("shards/9"):
        pass


def test_url_without_its_library_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(BackendUnavailable, match=r"s3://bucket needs fsspec.*pip install .*fsspec"):
        Store("s3://bucket")
    monkeypatch.undo()
    with pytest.raises(BackendUnavailable, match="nothing://x cannot be opened"):
        Store("nothing://x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:600] + b"x" + data[601:], "has other bytes"),
        (lambda data: data[:-1], "is not complete"),
    ],
)
def test_damaged_shards_are_found(whole: Path, plan: SamplePlan, tmp_path: Path, damage, message) -> None:
    for name, data in files(whole).items():
        Store(tmp_path).write(name, damage(data) if name == shard_name(plan, 1) else data)
    with pytest.raises(IntegrityError, match=message):
        merge(Store(tmp_path), tmp_path / "all.npz")
    assert not (tmp_path / "all.npz").exists()


def test_record_cut_short_is_written_again(unet_bundle: Path, whole: Path, plan: SamplePlan, tmp_path: Path) -> None:
    for name, data in files(whole).items():
        Store(tmp_path).write(name, data[:50] if name == record_name(2) else data)
    assert missing_shards(Store(tmp_path), plan) == [2]
    run_local(Worker(bundle=str(unet_bundle), out=str(tmp_path), plan=plan))
    assert files(tmp_path) == files(whole)


def test_another_plan_is_refused(unet_bundle: Path, whole: Path, plan: SamplePlan, tmp_path: Path) -> None:
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_inference_steps=1) as gen:
        other = make_plan(gen, num_images=11, shard_size=4, seed=101)
    with pytest.raises(ConfigError, match=r"first_seed 100, expected 101"):
        start_or_resume(Store(whole), other)
    for name, data in files(whole).items():
        Store(tmp_path).write(name, data)
    (tmp_path / "plan.json").unlink()
    start_or_resume(Store(tmp_path), other)
    with pytest.raises(IntegrityError, match=r"belongs to plan .*another place"):
        missing_shards(Store(tmp_path), other)
    with pytest.raises(ConfigError, match=r"holds no batch generation.*scm-export sample"):
        merge(Store(tmp_path / "empty"), None)


def test_another_artifact_is_refused(unet_bundle: Path, plan: SamplePlan, tmp_path: Path) -> None:
    other = msgspec.structs.replace(plan, artifact_sha256="0" * 64)
    start_or_resume(Store(tmp_path), other)
    with pytest.raises(ConfigError, match=r"another artifact than the plan's \(000000000000\)"):
        run_local(Worker(bundle=str(unet_bundle), out=str(tmp_path), plan=other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-size", "4", "--num-shards", "3"], "both given"),
        (["--num-shards", "12"], "12 shards for 11 images"),
        (["--num-shards", "3", "--shard-index", "3"], r"shard 3 is given, expected 0..2"),
        (["--class-label", "unicorn"], "class label is 'unicorn'"),
        (["--guidance-scale", "2"], "no such input"),
        (["--format", "zip"], "expected tar, parquet or npz"),
    ],
)
def test_wrong_options(unet_bundle: Path, tmp_path: Path, options: list[str], message: str) -> None:
    arguments = ["sample", str(unet_bundle), "-o", str(tmp_path / "x"), "--num-images", "11", *options]
    outcome = CliRunner().invoke(main, arguments)
    assert outcome.exit_code == 2 and message in outcome.output, outcome.output
    assert not list(tmp_path.glob("x/shards/*"))


def test_commands(unet_bundle: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(Store(whole))
    assert plan is not None
    out = tmp_path / "x"
    arguments = ["sample", str(unet_bundle), "-o", str(out), "--num-images", "11", "--num-shards", "3", "--seed", "100"]
    arguments += ["--backend", "onnxruntime", "--steps", "1"]
    one = CliRunner().invoke(main, [*arguments, "--shard-index", "1"])
    assert one.exit_code == 0 and "4 images in 1 shard, 1 of them written now" in one.stderr, one.output
    read: list[str] = []
    read_file = Store.read

    def reading(store: Store, name: str) -> bytes | None:
        read.append(name)
        return read_file(store, name)

    monkeypatch.setattr(Store, "read", reading)
    again = CliRunner().invoke(main, [*arguments, "--json"])
    assert json.loads(again.stdout)["written"] == 2
    records = [name for name in read if name.startswith("shards/")]
    assert records == [record_name(shard) for shard in range(3)], "an object store bills each read"
    merged = CliRunner().invoke(main, ["merge", str(out), "-o", str(tmp_path / "all.npz"), "--json"])
    assert json.loads(merged.stdout)["num_images"] == 11, merged.output
    assert files(out) == files(whole)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("ray"), reason="the extra ray is not installed")
def test_ray_writes_the_same(unet_bundle: Path, whole: Path, tmp_path: Path) -> None:
    arguments = [
        sys.executable, "-m", "scm_sdk.export.cli", "sample", str(unet_bundle), "-o", str(tmp_path), "--num-images",
        "11", "--shard-size", "4", "--seed", "100", "--backend", "onnxruntime", "--steps", "1", "--json",
        "--executor", "ray",
    ]  # fmt: skip
    arguments += ["--cpus-per-worker"]
    env = os.environ | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}  # else Ray writes one to the home folder
    refused = subprocess.run([*arguments, "64", "--workers", "3"], capture_output=True, encoding="utf-8", env=env)
    assert refused.returncode == 2 and "expected at least 1 for Ray Data's own tasks" in refused.stderr, refused.stderr
    done = subprocess.run([*arguments, "0.25", "--workers", "2"], capture_output=True, encoding="utf-8", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == 3
    assert files(tmp_path) == files(whole)
