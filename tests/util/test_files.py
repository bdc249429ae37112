"""Nothing half-written stays on disk, whatever fails and whenever it fails."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.disk_faults import fail_on_call, tree
from scm_sdk._util.files import (
    atomic_write_bytes,
    check_relative,
    check_writable,
    safe_join,
    scratch_folder,
    sha256_file,
)
from scm_sdk.errors import BundleError, IntegrityError, ScmError, TrainError


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "x.bin"
    for content in (b"one", memoryview(b"two, longer"), b""):
        atomic_write_bytes(target, content)
        assert tree(tmp_path) == {"new/folder/x.bin": bytes(content)}


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic_write_bytes(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "old"])
def test_a_full_disk_leaves_the_old_file(
    call: str, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.bin"
    if old is not None:
        target.write_bytes(old)
    before = tree(tmp_path)
    monkeypatch.setattr(os, call, fail_on_call(0, getattr(os, call)))
    with pytest.raises(TrainError, match=r"x.bin cannot be written: No space left.*Free some space"):
        atomic_write_bytes(target, b"new", error=TrainError)
    assert tree(tmp_path) == before


def test_a_rename_that_the_disk_does_not_confirm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail_on_call(1, os.fsync, errno.EIO))
    with pytest.raises(ScmError, match=r"x was replaced, .*: Input/output error"):
        atomic_write_bytes(tmp_path / "x", b"new")
    assert tree(tmp_path) == {"x": b"new"}


def test_a_file_system_without_folder_fsync_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail_on_call(1, os.fsync, errno.EINVAL))
    atomic_write_bytes(tmp_path / "x", b"new")
    assert tree(tmp_path) == {"x": b"new"}


@pytest.mark.parametrize(
    "code, remedy",
    [
        (errno.EROFS, "Choose a folder on a disk that is not read-only"),
        (errno.EACCES, "Choose a folder that you may write to"),
        (errno.EPERM, "Choose a folder that you may write to"),
        (errno.EDQUOT, "Free some space"),
        (errno.EIO, "Check the path and the disk"),
    ],
)
def test_each_refusal_says_what_to_do(code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail_on_call(0, os.fsync, code))
    with pytest.raises(ScmError, match=remedy):
        atomic_write_bytes(tmp_path / "x", b"")
    assert tree(tmp_path) == {}


def test_a_path_below_a_file_or_onto_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ScmError, match=r"cannot be written: (Not a directory|File exists)"):
        atomic_write_bytes(tmp_path / "file" / "x", b"")
    with pytest.raises(ScmError, match="cannot be written: Is a directory"):
        atomic_write_bytes(tmp_path / "folder", b"")
    assert tree(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("check", [lambda path: atomic_write_bytes(path, b"x"), check_writable])
def test_a_pipe_or_a_device_is_not_replaced(check: Callable[[Path], None], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ScmError, match=r"pipe cannot be written: it is a pipe"):
        check(pipe)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@given(st.binary(max_size=100), st.integers(0, 3))
def test_sha256(tmp_path_factory: pytest.TempPathFactory, content: bytes, repeats: int) -> None:
    path = tmp_path_factory.getbasetemp() / "hashed"
    content *= 30_000**repeats if repeats < 2 else 1
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()


def test_sha256_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="gone cannot be read: No such file"):
        sha256_file(tmp_path / "gone")


HOSTILE = [
    *["", ".", "..", "/etc/passwd", "a/../../b", "../b", "a/..", "./a", "a//b", "a/", "a\\b", "C:/x", "c:x"],
    *["a\0b", "a\nb", "\u202etxt.exe"],  # a right-to-left mark shows another name than it has
]


@pytest.mark.parametrize("relative", HOSTILE)
def test_hostile_paths_are_refused(relative: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not allowed, expected a relative POSIX path"):
        safe_join(tmp_path, relative)


@given(st.text(max_size=12) | st.lists(st.sampled_from(["..", ".", "a", "", "/", "\\", "C:"])).map("/".join))
def test_an_accepted_path_stays_inside(relative: str) -> None:
    try:
        check_relative(relative)
    except BundleError:
        return
    normal = os.path.normpath(os.path.join("/root", relative))
    assert normal == f"/root/{relative}"


def test_a_link_may_point_inside_and_not_outside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "real").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"")
    (root / "inside").symlink_to("real")
    (root / "outside").symlink_to("../secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    assert safe_join(root, "inside") == root / "inside"
    for relative in ("outside", "folder/secret"):
        with pytest.raises(BundleError, match=r"is a link that leads out of .*cp -rL"):
            safe_join(root, relative)
    # Newer Pythons resolve a loop to itself, which is inside; opening it then fails.
    try:
        assert safe_join(root, "loop") == root / "loop"
    except BundleError as exc:
        assert "cannot be resolved" in str(exc)


def test_a_temporary_folder_that_is_full_or_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScmError, match=r"scm-.* cannot be written: .*TMPDIR names another") as caught, scratch_folder():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.__cause__ is not None
    with pytest.raises(ZeroDivisionError), scratch_folder() as folder:
        raise ZeroDivisionError
    assert not folder.exists()
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(ScmError, match=r"no temporary folder can be made: .*Set TMPDIR"), scratch_folder():
        pass
