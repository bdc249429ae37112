"""The cache of unpacked ``.scmz`` files: filled once, listed and cleaned by ``scm-export cache``."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from scm_sdk._util.files import staging
from scm_sdk.bundle import archive_cache
from scm_sdk.bundle.archive import pack
from scm_sdk.errors import IntegrityError
from scm_sdk.export.cli import main
from scm_sdk.inference.generator import Generator
from scm_sdk.spec import SamplerSpec

SPEC = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4))


@pytest.fixture
def archives(linear_bundle: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Two archives; the first was opened long ago, the second just now."""
    files = [pack(linear_bundle(SPEC, name=name, gain=gain), tmp_path / f"{name}.scmz")
             for name, gain in (("old", 0.25), ("new", 0.5))]  # fmt: skip
    folders = [archive_cache.unpacked(file) for file in files]
    long_ago = time.time() - 40 * 86400
    os.utime(folders[0], (long_ago, long_ago))
    return files


def gc(*options: object) -> str:
    done = CliRunner().invoke(main, ["cache", "gc", *map(str, options)])
    assert done.exit_code == 0, done.output
    return done.stderr


def names() -> list[str]:
    return [entry.name for entry in archive_cache.entries()]


def test_it_is_listed_the_longest_unused_first(archives: list[Path]) -> None:
    assert names() == ["old", "new"]
    shown = CliRunner().invoke(main, ["cache", "ls"]).stderr
    assert "bundle old" in shown and "2 bundles" in shown and "0 engines" in shown
    listed = json.loads(CliRunner().invoke(main, ["cache", "ls", "--json"]).stdout)
    assert [each["kind"] for each in listed] == ["bundle", "bundle"] and all(each["bytes"] > 100 for each in listed)


def test_opening_it_again_makes_it_young(archives: list[Path]) -> None:
    archive_cache.unpacked(archives[0])
    assert names() == ["new", "old"]


def test_what_was_unused_for_long_goes_and_comes_back(archives: list[Path]) -> None:
    assert "removed 0 bundles" in gc() and names() == ["old", "new"]
    assert "removed 1 bundle," in gc("--max-age", 30) and names() == ["new"]
    Generator.from_pretrained(archives[0], backend="onnxruntime").close()
    assert names() == ["new", "old"]


def test_the_longest_unused_goes_until_the_rest_is_small_enough(archives: list[Path]) -> None:
    newest = archive_cache.entries()[1]
    gc("--max-size", newest.bytes * 1.01 / 1e6)
    assert names() == ["new"]
    gc("--max-size", 0)
    assert names() == [] and list(archive_cache.unpacked_folder().iterdir()) == []


def test_a_damaged_one_is_found_and_removed(archives: list[Path]) -> None:
    folder = archive_cache.unpacked(archives[1])
    (folder / "onnx/fp32/1step/model.onnx").write_bytes(b"x" * (folder / "onnx/fp32/1step/model.onnx").stat().st_size)
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        Generator.from_pretrained(archives[1], backend="onnxruntime")
    assert "removed 1 bundle," in gc() and names() == ["old"]
    Generator.from_pretrained(archives[1], backend="onnxruntime").close()


def test_what_a_killed_process_left_goes_and_what_is_being_filled_stays(archives: list[Path]) -> None:
    folder = archive_cache.unpacked_folder()
    left = folder / ".scm-01234567.partial"
    left.mkdir()
    (left / "half").write_bytes(b"x" * 1000)
    with staging(folder) as alive:
        (alive / "half").write_bytes(b"x" * 1000)
        assert "removed 1 bundle," in gc() and not left.exists() and (alive / "half").exists()
    assert names() == ["old", "new"]


def test_what_is_open_stays_until_it_is_closed(archives: list[Path]) -> None:
    with Generator.from_pretrained(archives[0], backend="onnxruntime"):
        assert "removed 1 bundle," in gc("--max-size", 0) and names() == ["old"]
    assert "removed 1 bundle," in gc("--max-size", 0) and names() == []


def test_a_link_in_the_cache_is_left_alone(archives: list[Path], tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (archive_cache.unpacked_folder() / "link").symlink_to(tmp_path / "outside")
    assert "removed 2 bundles," in gc("--max-size", 0) and (tmp_path / "outside").exists()


def test_cleaning_runs_beside_opening(archives: list[Path]) -> None:
    """Neither meets what the other is removing or making."""
    code = (
        "import sys; from scm_sdk.bundle import archive_cache as unpacked\n"
        "print('ready', flush=True)\n"
        "for _ in range(10**6):\n"
        "    unpacked.collect_garbage(max_bytes=0)\n"
        "    unpacked.entries()\n"
    )
    cleaners = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8") for _ in range(2)
    ]
    try:
        for cleaner in cleaners:
            assert cleaner.stdout is not None and cleaner.stdout.readline() == "ready\n"
        for number in range(60):
            Generator.from_pretrained(archives[number % 2], backend="onnxruntime").close()
        assert [cleaner.poll() for cleaner in cleaners] == [None, None]
    finally:
        for cleaner in cleaners:
            cleaner.kill()
            cleaner.communicate()


def test_several_processes_unpack_one_file(archives: list[Path]) -> None:
    gc("--max-size", 0)
    code = "import sys; from scm_sdk.inference.generator import Generator\n"
    code += "Generator.from_pretrained(sys.argv[1], backend='onnxruntime').close()"
    several = [subprocess.Popen([sys.executable, "-c", code, str(archives[0])]) for _ in range(3)]
    assert [process.wait(120) for process in several] == [0, 0, 0]
    assert names() == ["old"] and len(list(archive_cache.unpacked_folder().iterdir())) == 1


def test_a_manifest_that_cannot_be_read(archives: list[Path]) -> None:
    (archive_cache.unpacked(archives[1]) / "scm_manifest.json").write_text("{", encoding="utf-8")
    assert "(unfinished)" in CliRunner().invoke(main, ["cache", "ls"]).stderr
    assert "removed 1 bundle," in gc() and names() == ["old"]
