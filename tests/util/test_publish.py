"""A folder takes another's place whole or not at all, by each way that there is, whatever fails."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.disk_faults import fail_on_call, tree
from scm_sdk._util import publish
from scm_sdk._util.files import staging
from scm_sdk._util.locks import locked, try_lock
from scm_sdk._util.publish import JOURNAL_NAME, atomic_folder, finish_interrupted, staged_folder
from scm_sdk.errors import BundleError, ScmError


def fill(path: Path, content: bytes, **options: Any) -> None:
    with atomic_folder(path, **options) as folder:
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "a.bin").write_bytes(content)
        (folder / "mark.json").write_bytes(b"{}")


def of(content: bytes) -> dict[str, bytes]:
    return {"deep/er/a.bin": content, "mark.json": b"{}"}


def refuse_call(number: int, real: Callable[..., Any], refused: list[Any]) -> Callable[..., Any]:
    """Return ``real`` with its call ``number`` refused by a full disk, and noted."""
    calls = iter(range(1000))

    def call(*names: Any, **options: Any) -> Any:
        if next(calls) == number:
            refused.append(names)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*names, **options)

    return call


def no_exchange(*_: Path) -> None:
    """Answer as a file system that cannot swap two folders."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.fixture(params=["exchange", "in place"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Publish by one of the two ways."""
    if request.param == "in place":
        monkeypatch.setattr(publish, "exchange", no_exchange)
    return str(request.param)


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "out" / "bundle"
    with atomic_folder(target) as folder:
        assert folder.parent.parent == target.parent.resolve()
        (folder / "a").write_bytes(b"1")
        assert not target.exists()
    assert tree(tmp_path) == {"out/bundle/a": b"1"}


def test_a_new_folder_gets_the_permissions_of_any(tmp_path: Path) -> None:
    fill(tmp_path / "ours", b"")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "ours").chmod(0o2775)
    fill(tmp_path / "ours", b"new", overwrite=True)
    assert (tmp_path / "ours").stat().st_mode & 0o7777 == 0o2775


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(BundleError, match=r"cannot be written: (Not a directory|File exists)"):
        fill(tmp_path / "file" / "x", b"")
    assert tree(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, FileNotFoundError, BundleError])
def test_an_error_in_the_block_removes_the_folder_and_is_kept(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error, match=r"^mine$"), atomic_folder(tmp_path / "b") as folder:
        (folder / "a").write_bytes(b"1")
        raise error("mine")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_block_is_translated(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"b cannot be written: No space left on device"),
        atomic_folder(tmp_path / "b"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["replace", "rename", "fsync", "mkdir"])
@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "old"])
def test_a_full_disk_leaves_the_old_folder(
    call: str, old: bytes | None, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call fails, the folder is afterwards, or once there is room, all of the old or all of the new."""
    target = tmp_path / "b"
    wrong = []
    for number in range(1000):
        shutil.rmtree(target, ignore_errors=True)
        if old is not None:
            fill(target, old)
        with monkeypatch.context() as patch:
            failures: list[Any] = []
            patch.setattr(os, call, refuse_call(number, getattr(os, call), failures))
            try:
                fill(target, b"new", overwrite=True)
                refused = False
            except BundleError as exc:
                refused = True
                said = "was changed in part" if (target / JOURNAL_NAME).exists() else "b cannot be written"
                assert said in str(exc) and "No space left on device" in str(exc)
        finish_interrupted(target)
        found = tree(target)
        if found != of(b"new") and (not refused or found != ({} if old is None else of(old))):
            wrong.append((number, found))
        assert [path.name for path in tmp_path.iterdir()] in (["b"], [])
        if not failures:
            break
    assert not wrong


def test_an_old_folder_is_replaced_only_when_allowed(way: str, tmp_path: Path) -> None:
    target = tmp_path / "b"
    fill(target, b"old")
    with pytest.raises(BundleError, match=r"exists and is not empty, expected a new.*overwrite"):
        fill(target, b"new")
    assert tree(target)["deep/er/a.bin"] == b"old"
    fill(target, b"new", overwrite=True)
    assert tree(tmp_path) == {"b/deep/er/a.bin": b"new", "b/mark.json": b"{}"}


def test_what_is_no_longer_there_is_deleted(way: str, tmp_path: Path) -> None:
    fill(tmp_path / "b", b"old")
    with atomic_folder(tmp_path / "b", overwrite=True, marker="mark.json") as folder:
        (folder / "mark.json").write_bytes(b"[]")
    assert tree(tmp_path) == {"b/mark.json": b"[]"} and not (tmp_path / "b/deep").exists()


def test_a_folder_without_the_marker_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "last.txt").write_bytes(b"years")
    with pytest.raises(BundleError, match=r"holds no mark.json, so it is not replaced"):
        fill(tmp_path / "thesis", b"new", overwrite=True, marker="mark.json")
    assert tree(tmp_path) == {"thesis/last.txt": b"years"}


def test_an_empty_folder_may_wait_and_a_file_may_not(way: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", b"new")
    assert (tmp_path / "empty" / "mark.json").is_file()
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(BundleError, match="file is a file, expected a folder"):
        fill(tmp_path / "file", b"new", overwrite=True)
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Two commands write to one new name: the first to end has it, the other is refused."""
    with pytest.raises(BundleError, match="exists and is not empty"), atomic_folder(tmp_path / "b") as folder:
        (folder / "a").write_bytes(b"mine")
        fill(tmp_path / "b", b"theirs")
    assert tree(tmp_path)["b/deep/er/a.bin"] == b"theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_with_overwrite_the_later_of_two_stays(way: str, tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "b", overwrite=True, marker="mark.json") as folder:
        (folder / "mark.json").write_bytes(b"later")
        fill(tmp_path / "b", b"earlier", overwrite=True)
    assert tree(tmp_path) == {"b/mark.json": b"later"}


def test_a_link_to_a_folder_stays_a_link(way: str, tmp_path: Path) -> None:
    fill(tmp_path / "real", b"old")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", b"new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "real")["deep/er/a.bin"] == b"new"


def test_files_of_others_stay(way: str, tmp_path: Path) -> None:
    """What does not belong to the old folder stays, whenever it came."""
    target = tmp_path / "b"
    fill(target, b"old")
    owned = dict(marker="mark.json", owned=lambda _: ["deep/er/a.bin", "mark.json"], overwrite=True)
    (target / "notes.txt").write_bytes(b"mine")
    with staged_folder(target, **owned) as staged:
        (staged.folder / "mark.json").write_bytes(b"[]")
        (target / "deep/er/late.txt").write_bytes(b"mine, too")
        staged.publish()
    assert tree(target) == {"mark.json": b"[]", "notes.txt": b"mine", "deep/er/late.txt": b"mine, too"}
    (target / "notes.txt").unlink()
    (target / "deep/er/late.txt").unlink()
    with staged_folder(target, **owned) as staged:
        (staged.folder / "mark.json").write_bytes(b"{}")
        (target / "late.txt").write_bytes(b"mine")
        staged.publish()
    assert tree(tmp_path) == {"b/mark.json": b"{}", "b/late.txt": b"mine"}


def test_a_file_in_the_place_of_a_folder_is_refused_whole(tmp_path: Path) -> None:
    target = tmp_path / "b"
    fill(target, b"old")
    (target / "notes.txt").write_bytes(b"mine")
    with (
        pytest.raises(BundleError, match=r"deep/er is a folder there\. Nothing was changed"),
        staged_folder(target, overwrite=True, owned=lambda _: ["deep/er/a.bin", "mark.json"]) as staged,
    ):
        (staged.folder / "deep").mkdir()
        (staged.folder / "deep/er").write_bytes(b"a file")
        staged.publish()
    assert tree(tmp_path) == {"b/notes.txt": b"mine", **{f"b/{name}": data for name, data in of(b"old").items()}}


# What was killed.


def test_what_a_killed_command_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom scm_sdk._util.files import staging\n"
        "with staging(pathlib.Path(sys.argv[1])) as folder:\n"
    )
    code += "    (folder / 'big').write_bytes(b'x'); print(folder.name, flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as other:
        assert other.stdout is not None
        left = tmp_path / other.stdout.readline().strip()
        fill(tmp_path / "b", b"1")
        assert (left / "big").is_file(), "its maker is alive"
        other.kill()
    assert (left / "big").is_file()
    for name in (".b.01234567.partial", ".b.89abcdef.old", ".c.01234567.partial"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "b", b"2", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.01234567.partial", "b"]


def test_the_only_copy_gets_its_name_back(tmp_path: Path) -> None:
    """Versions before 0.1.0 could be killed between two renames."""
    fill(tmp_path / "b", b"old")
    os.rename(tmp_path / "b", tmp_path / ".b.01234567.old")
    finish_interrupted(tmp_path / "b")
    assert tree(tmp_path / "b") == of(b"old")


def interrupted(target: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Replace a folder in place, and end without ceremony before the rename with this number."""
    fill(target, b"old")
    (target / "mark.json").write_bytes(b"[old]")
    code = f"""
import errno, os, sys, pathlib
from scm_sdk._util import publish
def cannot(*_): raise OSError(errno.EINVAL, "")
publish.exchange, real, left = cannot, os.replace, [{at}]
def deadly(*names):
    left[0] -= 1
    os._exit(77) if left[0] < 0 else real(*names)
with publish.atomic_folder(pathlib.Path(sys.argv[1]), overwrite=True, marker="mark.json") as folder:
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/a.bin").write_bytes(b"new")
    (folder / "fresh").write_bytes(b"new")
    (folder / "mark.json").write_bytes(b"[new]")
    os.replace = deadly
"""
    done = subprocess.run([sys.executable, "-c", code, str(target)])
    assert done.returncode == 77


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_journal_is_finished(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b"
    interrupted(target, monkeypatch, at)
    assert (target / JOURNAL_NAME).is_file() == (at > 0)
    fill(tmp_path / "other", b"")  # a concurrent writer leaves what is needed
    finish_interrupted(target)
    new = {"deep/er/a.bin": b"new", "fresh": b"new", "mark.json": b"[new]"}
    found = {name: data for name, data in tree(target).items() if ".partial" not in name}
    assert found == (new if at else of(b"old") | {"mark.json": b"[old]"})
    fill(target, b"newer", overwrite=True)
    assert tree(target) == of(b"newer")


def test_a_journal_that_cannot_be_finished_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b"
    interrupted(target, monkeypatch, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_on_call(0, os.replace, errno.EROFS))
        with pytest.raises(BundleError, match=r"was interrupted.*Read-only file system.*scm-export bundle verify"):
            finish_interrupted(target)
    finish_interrupted(target)
    assert tree(target)["mark.json"] == b"[new]"


def test_a_change_that_is_refused_half_way_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b"
    fill(target, b"old")
    monkeypatch.setattr(publish, "exchange", no_exchange)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_on_call(2, os.replace, errno.EBUSY))  # the journal, a.bin, then mark.json
        with pytest.raises(BundleError, match=r"was changed in part.*busy.*scm-export bundle verify"):
            fill(target, b"new", overwrite=True)
    finish_interrupted(target)
    assert tree(target) == of(b"new")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "link/x"])
@pytest.mark.parametrize("part", ["new", "replaced", "removed"])
def test_a_journal_of_a_stranger_stays_in_its_folder(name: str, part: str, tmp_path: Path) -> None:
    import json

    target = tmp_path / "b"
    (target / ".scm-01234567.partial").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"kept")
    (target / "link").symlink_to(tmp_path)
    journal = {"staging": ".scm-01234567.partial", "new": [], "replaced": [], "removed": []} | {part: [name]}
    (target / JOURNAL_NAME).write_text(json.dumps(journal), encoding="utf-8")
    with pytest.raises(BundleError, match=r"is damaged .*(not allowed|leads out)"):
        finish_interrupted(target)
    (target / JOURNAL_NAME).write_text(json.dumps(journal | {part: [], "staging": "../x"}), encoding="utf-8")
    with pytest.raises(BundleError, match="is damaged"):
        finish_interrupted(target)
    (target / JOURNAL_NAME).unlink()
    (target / JOURNAL_NAME).symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="is damaged"):
        finish_interrupted(target)
    assert tree(tmp_path)["outside"] == b"kept"


# Who waits for whom.


def test_a_folder_has_one_writer_or_many_readers(tmp_path: Path) -> None:
    with locked(tmp_path, shared=True):
        other = try_lock(tmp_path, shared=True)
        assert other is not None and try_lock(tmp_path) is None
        other.release()
    with locked(tmp_path):
        assert try_lock(tmp_path, shared=True) is None
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match=r"symbolic|directory"):
        try_lock(tmp_path / "link")


def test_who_waited_locks_the_folder_that_took_the_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import threading

    target, passed = tmp_path / "b", threading.Event()
    target.mkdir()

    def wait() -> None:
        with locked(target, purpose="the test"):
            assert try_lock(target) is None, "the lock is of what is there now"
            passed.set()

    with locked(target):
        thread = threading.Thread(target=wait)
        thread.start()
        while not caplog.records:
            pass
        os.rename(target, tmp_path / "old")
        target.mkdir()
    thread.join(60)
    assert passed.is_set() and f"the test: waiting for another command that holds {target}" in caplog.text


def test_where_nothing_can_be_written_it_is_said_before_the_work(tmp_path: Path) -> None:
    fill(tmp_path / "b", b"old")
    code = "import os, sys; os.setgid(65534); os.setuid(65534); from scm_sdk._util.publish import atomic_folder\n"
    code += "with atomic_folder(sys.argv[1], overwrite=True): print('work')"
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    tmp_path.chmod(0o755)
    for path in tmp_path.parents:
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o001)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, encoding="utf-8")
    assert done.returncode and "work" not in done.stdout
    assert "b cannot be written: Permission denied" in done.stderr
    # A folder of one's own in one that is not: in place.
    for path in (tmp_path / "b", *(tmp_path / "b").rglob("*")):
        os.chown(path, 65534, 65534)
    code = code.replace("print('work')", "pass")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path) == {} and (tmp_path / "b").is_dir()


def test_an_error_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"")
    with pytest.raises(ScmError, match="is a file"), atomic_folder(tmp_path / "b", error=ScmError):
        pass
    with staging(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
