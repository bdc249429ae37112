"""Whose engines run: only those that this user built here, whatever else is in the cache."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from scm_sdk._util import cache_dir
from scm_sdk._util.cache_dir import CACHE_VARIABLE, cache_folder
from scm_sdk.bundle import archive_cache
from scm_sdk.bundle.archive import Archive, pack
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import ParityRecord
from scm_sdk.bundle.verify import read_manifest
from scm_sdk.engines.compatibility import TRUST_VARIABLE, is_trusted, remember_built
from scm_sdk.errors import ConfigError, IntegrityError
from scm_sdk.export.cli import main
from scm_sdk.inference.generator import Generator
from scm_sdk.spec import SamplerSpec

ENGINE = "0" * 64
SPEC = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache in which this user has built ``ENGINE``; warnings come again."""
    top = Path(tempfile.mkdtemp()).resolve()
    monkeypatch.setenv(CACHE_VARIABLE, str(top / "cache"))
    monkeypatch.setattr(cache_dir, "_WARNED", set())
    remember_built(ENGINE)
    assert is_trusted(ENGINE)
    yield top / "cache"
    shutil.rmtree(top)


@pytest.mark.parametrize("value", ["1", "true", "Yes", "ON"])
def test_words_that_trust(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, value)
    assert is_trusted(ENGINE)


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "off", "OFF"])
def test_words_that_do_not(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, value)
    assert not is_trusted(ENGINE)


@pytest.mark.parametrize("value", [" ", "n", "disabled", "2", "ja"])
def test_other_words_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, value)
    with pytest.raises(ConfigError, match=f"{TRUST_VARIABLE} is '{value}', expected 1, true, yes, on"):
        is_trusted(ENGINE)


def open_to_all(cache: Path) -> None:
    (cache / "built").chmod(0o777)


def open_above(cache: Path) -> None:
    cache.chmod(0o775)


def linked(cache: Path) -> None:
    (cache / "built").rename(cache / "elsewhere")
    (cache / "built").symlink_to(cache / "elsewhere")


def linked_as_a_whole(cache: Path) -> None:
    cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to(cache.with_name("elsewhere"))


def of_another_user(cache: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(cache / "built", 54321, 54321)


@pytest.mark.parametrize("spoil", [open_to_all, open_above, linked, linked_as_a_whole, of_another_user])
def test_markers_count_only_where_nobody_else_can_put_them(spoil: Callable[[Path], None], cache: Path) -> None:
    spoil(cache)
    with pytest.warns(RuntimeWarning, match="is ignored: .*(can be written by other|is a link|belongs to)") as said:
        assert not is_trusted(ENGINE)
        assert not is_trusted(ENGINE)
    assert len(said) == 1, "once"


def test_a_marker_from_elsewhere_says_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "built" / ("1" * 64)).write_bytes(b"")
    assert not is_trusted("1" * 64)
    shutil.copy(cache / "built" / ENGINE, cache / "built" / ("1" * 64))
    assert not is_trusted("1" * 64), "of another engine"
    monkeypatch.setenv(CACHE_VARIABLE, str(cache.with_name("other")))
    remember_built("2" * 64)
    shutil.copy(cache / "built" / ENGINE, cache.with_name("other") / "built" / ENGINE)
    assert not is_trusted(ENGINE), "of another user's key"


def test_the_key_is_the_users_alone(cache: Path) -> None:
    key = cache / "built" / "key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32
    key.chmod(0o644)
    with pytest.warns(RuntimeWarning, match="key is ignored"):
        assert not is_trusted(ENGINE)


def test_a_relative_folder_of_the_environment_is_no_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path would let the working folder choose the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, "rel")
    with pytest.raises(ConfigError, match=f"{CACHE_VARIABLE} is 'rel', expected an absolute path"):
        cache_folder()
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "rel")
    monkeypatch.setenv("HOME", "/home/somebody")
    found = cache_folder()
    assert found is not None and found.is_relative_to("/home/somebody"), "as the XDG specification says"
    monkeypatch.setenv("HOME", "")
    found = cache_folder()
    assert found is None or found.is_absolute()


@pytest.fixture
def two(linear_bundle: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Two archives of bundles that differ."""
    return [pack(linear_bundle(SPEC, name=name, gain=gain), tmp_path / f"{name}.scmz")
            for name, gain in (("a", 0.25), ("b", 0.5))]  # fmt: skip


def name_of(archive: Path) -> str:
    with Generator.from_pretrained(archive, backend="onnxruntime") as gen:
        assert gen.source.bundle is not None
        return gen.source.bundle.manifest.name


def test_a_planted_link_is_not_opened_in_an_archives_place(two: list[Path], cache: Path) -> None:
    folders = [archive_cache.unpacked(archive) for archive in two]
    shutil.rmtree(folders[0])
    folders[0].symlink_to(folders[1])
    with pytest.warns(RuntimeWarning, match="is a link"):
        assert name_of(two[0]) == "a"
    assert name_of(two[1]) == "b"


def test_a_cache_that_all_can_write_is_not_opened(two: list[Path], cache: Path) -> None:
    folders = [archive_cache.unpacked(archive) for archive in two]
    shutil.rmtree(folders[0])
    shutil.copytree(folders[1], folders[0])
    (cache / "unpacked").chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written by other users"):
        assert name_of(two[0]) == "a"


def after_hashing(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something when an archive was hashed for the first time."""
    digest, done = Archive.sha256, []

    def then_act(self: Archive) -> str:
        found = digest(self)
        if not done:
            done.append(act())
        return found

    monkeypatch.setattr(Archive, "sha256", then_act)


def test_an_archive_that_is_replaced_while_it_is_opened(
    two: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was hashed is what is unpacked and kept, whatever has its name by then."""
    after_hashing(lambda: os.replace(two[1], two[0]), monkeypatch)
    assert read_manifest(archive_cache.unpacked(two[0])).name == "a"
    assert name_of(two[0]) == "b"


def test_an_archive_that_is_written_to_while_it_is_opened(
    two: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_hashing(lambda: two[0].write_bytes(two[1].read_bytes()), monkeypatch)
    with pytest.raises(IntegrityError, match="was written to while it was opened"):
        archive_cache.unpacked(two[0])
    assert name_of(two[0]) == "b"


def test_an_entry_of_another_bundle_is_unpacked_anew(two: list[Path], cache: Path) -> None:
    """Swapped within the user's own cache: each is compared with the manifest in the file that was asked for."""
    first, second = (archive_cache.unpacked(archive) for archive in two)
    first.rename(aside := first.with_name("aside"))
    second.rename(first)
    aside.rename(second)
    assert [name_of(archive) for archive in two] == ["a", "b"]
    (first / "scm_manifest.json").unlink()
    assert name_of(two[0]) == "a", "half removed"


def test_a_group_umask_makes_no_cache_that_is_ignored(two: list[Path], cache: Path) -> None:
    before = os.umask(0o002)
    try:
        folder = archive_cache.unpacked(two[0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert archive_cache.unpacked(two[0]) == folder and folder.is_relative_to(cache)
    finally:
        os.umask(before)


def test_a_bundle_cannot_command_a_terminal(linear_bundle: Callable[..., Path]) -> None:
    """Escape codes and changes of direction in every text of a manifest are shown, not obeyed."""
    evil = "\x1b[2J\x9b31m\u202e\r"
    record = ParityRecord(
        artifact="onnx/fp32/1step/model.onnx", reference=evil, backend="onnxruntime", threshold=1.0, noise_floor=0.0,
        max_abs=0.0, num_samples=1, passed=False, reason=evil, fault=evil,
    )  # fmt: skip
    path = linear_bundle(SPEC, name="linear", parity=[record, msgspec.structs.replace(record, backend=evil)],
                         provenance={evil: evil, "objective": evil}, versions={evil: evil})  # fmt: skip
    with pytest.warns(RuntimeWarning) as said, Generator.from_pretrained(path, backend="onnxruntime") as gen:
        texts = [str(gen.plan()), repr(gen)]
    texts += [str(each.message) for each in said]
    done = CliRunner().invoke(main, ["inspect", str(path)])
    assert done.exit_code == 0, done.stderr
    texts.append(done.stdout + done.stderr)
    texts.append((Bundle.open(path).with_card().path / "README.md").read_text("utf-8"))
    for text in texts:
        assert not set(text) & set(evil) - set("[2J31m"), text
    assert "\\x1b[2J" in texts[0]
