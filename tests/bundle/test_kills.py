"""A bundle is never absent, half new or lost, whenever its writer is killed, in each folder and for each reader."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.card import generated_for

WORKER = Path(__file__).resolve().parents[1] / "helpers" / "killed_writer.py"


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, encoding="utf-8", timeout=600)


def environment() -> dict[str, str]:
    paths = [str(WORKER.parent), str(WORKER.parents[1]), str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def carded(made_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with a generated card, which changes whenever the bundle does."""
    path = Path(shutil.copytree(made_bundle, tmp_path_factory.mktemp("carded") / "bundle"))
    Bundle.open(path).with_card()
    assert generated_for((path / "README.md").read_bytes()) is not None
    return path


@pytest.mark.parametrize("verb", ["extend", "extend in place", "record", "copy", "pack"])
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_call_leaves_a_bundle_that_opens(verb: str, stride: int, carded: Path, tmp_path: Path) -> None:
    done = run(WORKER, tmp_path / "work", carded, verb, stride)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    new = verb in ("copy", "pack")
    kills = [(number, *each) for number, each in enumerate(found, 1)]
    assert len(kills) * stride > 6
    assert {before for _, before, *_ in kills} <= ({"absent", "old"} if new else {"old", "new"})
    assert [each for each in kills if each[2] != ("old" if new else "new")] == []
    # A rerun is refused only where the name was new, and the killed command had put the bundle there.
    assert [each for each in kills if each[3] and not (verb == "copy" and each[1] == "old")] == []
    assert [each for each in kills if each[4] and not each[3]] == [], "the rerun removes what was left"


@pytest.mark.parametrize("swaps", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["exchange", "in place"])
def test_readers_beside_a_writer_see_a_whole_bundle(way: str, swaps: int, carded: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(carded, tmp_path / "bundle"))
    if way == "in place":
        (path / "notes.txt").write_text("mine", encoding="utf-8")
    code = (
        "import sys\nfrom scm_sdk.bundle.edit import extend_bundle\n"
        "from toy_bundles import ToyBundle, write_linear_graph\n"
        "for swap in range(int(sys.argv[2])):\n"
        "    with extend_bundle(sys.argv[1]) as draft:\n"
        "        write_linear_graph(draft.path(ToyBundle.graphs[0].path), ToyBundle.specs[0], gain=float(swap))\n"
        "        draft.path('reports/parity.json').write_bytes(b'%04d' % (swap % 2) * 1000)\n"
    )
    opened = set()
    with subprocess.Popen([sys.executable, "-c", code, str(path), str(swaps)], env=environment()) as writer:
        while writer.poll() is None:
            opened.add(Bundle.open(path).manifest.build_id)
    assert writer.returncode == 0
    assert len(opened) > 2, "it was opened while it changed"
    assert (path / "reports/parity.json").read_bytes() == b"0001" * 1000


MOUNTS = """
set -e
cd "$1"; export PATH="$PATH:/usr/sbin:/sbin"
mkdir mount low upper merged; cp -r "$2" source; cp -r "$2" low/bundle
mount --bind source mount
mount -t tmpfs none upper; mkdir upper/u upper/w upper/empty
mount -t overlay overlay -o lowerdir=low,upperdir=upper/u,workdir=upper/w merged
echo ready
"$3" -c "$4"
"""
IN_MOUNTS = """
import os
from pathlib import Path
from helpers.killed_writer import extend, is_new
from scm_sdk.bundle.bundle import Bundle
from scm_sdk._util.publish import atomic_folder
for path in (Path("mount"), Path("merged/bundle")):
    extend(path)
    assert is_new(path), path
    Bundle.open(path).with_budgets("median=5ms@b1")
    assert sorted(p.name for p in path.iterdir() if p.name.startswith(".")) == [], path
os.mkdir("tmpfs"); assert os.system("mount -t tmpfs none tmpfs") == 0
Bundle.open("mount").save_pretrained("tmpfs")
assert is_new(Path("tmpfs"))
assert os.system("mount -o remount,ro,bind mount") == 0
for work in (lambda: extend(Path("mount")), lambda: Bundle.open("mount").with_budgets()):
    try:
        work()
    except Exception as exc:
        assert "mount cannot be written: Read-only file system" in str(exc) or "scm_manifest" in str(exc), exc
    else:
        raise AssertionError("it was written")
assert is_new(Path("mount"))
print("done")
"""


def test_a_mount_and_a_layer_of_an_image_are_changed_in_place(carded: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs the command unshare")
    flags = "-m" if os.geteuid() == 0 else "-rm"
    command = ["unshare", flags, "bash", "-c", MOUNTS, "bash", tmp_path, carded, sys.executable, IN_MOUNTS]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, env=environment())
    if "ready" not in done.stdout:
        pytest.skip(f"no mounts may be made here: {done.stderr.strip()}")
    assert done.stdout.endswith("done\n"), done.stderr
