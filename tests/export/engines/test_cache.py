"""Engines are kept, found again, shared, and let go of."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from helpers.containers import run_python
from helpers.engine_helpers import graph, options
from scm_sdk._util.files import sha256_bytes
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.engines.compatibility import is_trusted
from scm_sdk.engines.targets import Target, resolve_targets
from scm_sdk.errors import ExportError, IntegrityError
from scm_sdk.export.cli import main
from scm_sdk.export.engines import cache
from scm_sdk.export.engines.add import add_engines

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 Linux and Windows")


def test_a_killed_build_leaves_nothing(graphs: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    before = {str(f): f.stat().st_mtime_ns for f in path.rglob("*")}
    code = (
        "import os, signal, sys\n"
        "from scm_sdk.export.engines.add import add_engines\n"
        "from scm_sdk.engines.targets import Target, resolve_targets\n"
        "from scm_sdk._util.events import Silent\n"
        "class Kill(Silent):\n"
        "    def step(self, *_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "add_engines(sys.argv[1], resolve_targets(['l4']), precisions=['fp16'], events=Kill())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=120, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert {str(f): f.stat().st_mtime_ns for f in path.rglob("*")} == before
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]
    assert cache.entries() == []
    (variant,) = add_engines(path, resolve_targets(["l4"]), precisions=["fp16"])  # its lock is no obstacle
    assert not variant.cached


def test_engines_join_the_bundle_and_are_found_again(graphs: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    targets = resolve_targets(["a10", "rtx3090", "rtx5090"])
    assert [t.compute_capability for t in targets] == ["8.6", "12.0"], "two boards of one kind are one engine"
    first = add_engines(path, targets, precisions=["fp16"])
    assert [(v.unchanged, v.cached) for v in first] == [(False, False)] * 2
    bundle = Bundle.open(path)
    artifact = next(a for a in bundle.manifest.artifacts if a.path == first[0].path)
    assert artifact.format == "tensorrt_rtx" and artifact.engine is not None
    assert artifact.engine.compute_capabilities == ("8.6",) and artifact.engine.batch == (1, 5, 5)
    assert all(v.unchanged for v in add_engines(path, targets, precisions=["fp16"]))

    other = Path(shutil.copytree(graphs, tmp_path / "other"))
    assert all(v.cached for v in add_engines(other, targets, precisions=["fp16"]))
    assert not add_engines(other, targets[:1], precisions=["fp16"], batch=(1, 1, 1))[0].cached, "other options"

    entry = cache.entries()[0]
    damaged = bytearray((entry.folder / "model.engine").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (entry.folder / "model.engine").unlink()  # a link into the bundle stays as it is
    (entry.folder / "model.engine").write_bytes(damaged)
    run = CliRunner().invoke(main, ["cache", "verify"])
    assert run.exit_code == IntegrityError.exit_code and "altered or cut short" in run.stderr
    third = Path(shutil.copytree(graphs, tmp_path / "third"))
    again = add_engines(third, targets, precisions=["fp16"])
    assert [v.cached for v in again].count(False) == 1, "a damaged engine is built again, never served"
    assert CliRunner().invoke(main, ["cache", "verify"]).exit_code == 0
    listed = json.loads(CliRunner().invoke(main, ["cache", "ls", "--json"]).stdout)
    assert len(listed) == 3
    assert "removed 3 engines" in CliRunner().invoke(main, ["cache", "gc", "--max-size", "0"]).stderr
    assert cache.entries() == []
    held = Bundle.open(path), Bundle.open(other)  # they hold their own
    engines = [e.sha256 for bundle in held for e in bundle.manifest.files if e.path.endswith(".engine")]
    assert len(engines) == 4 and all(map(is_trusted, engines)), "what was built here stays so"


def test_garbage_is_what_was_not_used_for_long(graphs: Path) -> None:
    for capability in ("8.6", "8.9"):
        cache.cached_engine(graph(graphs, "fp16"), options(capability))
    old = cache.entries()[0]
    long_ago = time.time() - 10 * 86400
    for file in old.folder.iterdir():
        os.utime(file, (long_ago, long_ago))
    assert [e.key for e in cache.collect_garbage(max_age_days=5)] == [old.key]
    assert cache.collect_garbage(max_bytes=10**9) == []
    (left,) = cache.entries()
    (left.folder / "build.json").write_text("{", encoding="utf-8")
    assert [e.problem() for e in cache.collect_garbage()] == ["build.json cannot be read"]


def test_the_second_builder_waits_and_finds_it_made(graphs: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from scm_sdk.export.engines.cache import cached_engine\n"
        "from scm_sdk.export.engines.options import EngineOptions\n"
        "print(cached_engine(Path(sys.argv[1]), EngineOptions(compute_capabilities=('8.0',), batch=(1, 2, 5)))[1])\n"
    )
    command = [sys.executable, "-c", code, str(graph(graphs, "fp16"))]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") for _ in range(2)]
    assert sorted(p.communicate(timeout=120)[0].strip() for p in both) == ["False", "True"]


def test_what_is_being_built_is_no_garbage_and_its_lock_stays(graphs: Path) -> None:
    filelock = pytest.importorskip("filelock")
    lock = cache.cached_engine(graph(graphs, "fp16"), options())[0].folder.with_suffix(".lock")
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], **pipes) as builder:
        assert builder.stdout is not None and builder.stdout.readline() == "held\n"
        assert cache.collect_garbage(max_bytes=0) == [] and len(cache.entries()) == 1
        builder.communicate("\n")
    before = lock.stat().st_ino
    assert len(cache.collect_garbage(max_bytes=0)) == 1
    assert lock.stat().st_ino == before, "one who waits for it and one who comes later must meet"
    with filelock.FileLock(lock, blocking=False):
        pass


def test_what_is_being_copied_is_no_garbage(graphs: Path) -> None:
    entry, _ = cache.cached_engine(graph(graphs, "fp16"), options())
    assert cache.collect_garbage(max_bytes=0) == []
    del entry
    assert len(cache.collect_garbage(max_bytes=0)) == 1


def test_a_lock_that_is_a_link_is_refused(graphs: Path, tmp_path: Path) -> None:
    entry, _ = cache.cached_engine(graph(graphs, "fp16"), options())
    lock = entry.folder.with_suffix(".lock")
    lock.unlink()
    (tmp_path / "mine").write_text("kept", encoding="utf-8")
    lock.symlink_to(tmp_path / "mine")
    with pytest.raises(ExportError, match=r"\.lock is a link, expected a plain file"):
        cache.cached_engine(graph(graphs, "fp16"), options())
    del entry
    assert cache.collect_garbage(max_bytes=0) == [] and (tmp_path / "mine").read_text("utf-8") == "kept"


def test_a_mismatch_is_let_pass_only_as_long_as_it_is_asked_for(graphs: Path, tmp_path: Path, monkeypatch) -> None:
    path = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    turing = {"precisions": ["int8"], "steps": [1]}
    targets = resolve_targets(["t4"])
    (loose,) = add_engines(path, targets, allow_mismatch=True, **turing)
    assert loose.record.census["mismatches"] and not loose.unchanged
    (again,) = add_engines(path, targets, allow_mismatch=True, **turing)
    assert again.unchanged
    monkeypatch.setattr(Target, "lacks", lambda self, precision, flavor: "")  # asked, so that the census decides
    with pytest.raises(ExportError, match="is not what the graph asks for"):
        add_engines(path, targets, **turing)


def test_an_engine_from_elsewhere_is_built_again_where_it_is_to_run(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal of an untrusted engine says so: build it here."""
    path = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    (made,) = add_engines(path, resolve_targets(["l4"]), precisions=["fp16"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-home"))
    assert not is_trusted(made.record.engine_sha256)
    (own,) = add_engines(path, resolve_targets(["l4"]), precisions=["fp16"])
    assert (own.unchanged, own.cached) == (False, False) and is_trusted(own.record.engine_sha256)
    assert add_engines(path, resolve_targets(["l4"]), precisions=["fp16"])[0].unchanged


def test_an_engine_that_was_planted_is_not_served(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, _ = cache.cached_engine(graph(graphs, "fp16"), options())
    evil = b"EVIL CODE" + (entry.folder / "model.engine").read_bytes()[9:]
    (entry.folder / "model.engine").write_bytes(evil)
    assert entry.record is not None
    record = msgspec.structs.replace(entry.record, engine_sha256=sha256_bytes(evil))
    (entry.folder / "build.json").write_bytes(record.to_json())
    run = CliRunner().invoke(main, ["cache", "verify"])
    assert run.exit_code == IntegrityError.exit_code and "this user did not build it here" in run.stderr
    again, hit = cache.cached_engine(graph(graphs, "fp16"), options())
    assert not hit and not (again.folder / "model.engine").read_bytes().startswith(b"EVIL")
    assert not is_trusted(record.engine_sha256)


def test_without_a_cache_it_is_built_for_this_process(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    code = (
        "import sys; from pathlib import Path\n"
        "from scm_sdk.export.engines.add import add_engines\n"
        "from scm_sdk.engines.targets import resolve_targets\n"
        f"print(len(add_engines({str(tmp_path / 'bundle')!r}, resolve_targets(['l4']), precisions=['fp16'])))\n"
    )
    shutil.copytree(graphs, tmp_path / "bundle")
    done = run_python(code, env={"HOME": str(tmp_path / "file")})
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1] == "1", done.stderr
    assert done.stderr.count("RuntimeWarning: engines are built again") == 1 and "SCM_CACHE_DIR" in done.stderr
    assert any("engines" in str(path) for path in (tmp_path / "bundle").rglob("model.engine"))
