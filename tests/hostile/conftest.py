"""The material of the campaign, and the table of its outcomes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from hostile.campaign import ACCEPTED, FAULTS, SEED, Tally, worker_environment

_TALLIES = pytest.StashKey[list[Tally]]()
_COLUMNS = ("refused or right", *FAULTS)
_LENGTH = ("--iterations", "3", "--checkpoint-every", "2", "--sample-every", "2", "--batch-size", "4")
TRAIN = ("--data", "data.npz", "--label", "kind", "--rows", "0", "128", "--preset", "tiny", *_LENGTH)
"""Options of ``train`` of the teacher."""
DISTILL = ("--teacher", "teacher", *_LENGTH)
_PACKAGES = ("numpy", "msgspec", "safetensors", "onnx", "onnxruntime", "openvino", "torch")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hostile-json", metavar="FILE", help="write the campaign's table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TALLIES] = []


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Tally], None]:
    """Return a function that puts a class into the table and fails if one of its cases has a fault."""

    def put(tally: Tally) -> None:
        request.config.stash[_TALLIES].append(tally)
        assert tally.tried, "no case was tried"
        assert not tally.failed, "\n".join([f"{tally.failed} of {tally.tried} {tally.name}", *tally.faults])

    return put


def _row(tally: Tally) -> dict[str, int]:
    good = sum(tally.counts.get(outcome, 0) for outcome in ("refused", "right"))
    return {"tried": tally.tried, "refused or right": good} | {name: tally.counts.get(name, 0) for name in FAULTS}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tallies = config.stash[_TALLIES]
    if not tallies:
        return
    terminalreporter.section("hostile cases")
    width = max(len(tally.name) for tally in tallies)
    columns = ("tried", *_COLUMNS)
    terminalreporter.write_line(" ".join([" " * width, *(f"{name:>9}" for name in columns)]))
    for tally in tallies:
        row = _row(tally)
        cells = [f"{row[name]:>{max(9, len(name))}}" for name in columns]
        terminalreporter.write_line(" ".join([f"{tally.name:<{width}}", *cells]))
    if path := config.getoption("--hostile-json", default=None):
        Path(path).write_text(json.dumps(_report(tallies), indent=2) + "\n", encoding="utf-8")


def _report(tallies: list[Tally]) -> dict[str, object]:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, encoding="utf-8", cwd=here)
    cpu = [
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    machine = {
        "processor": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
    }
    return {
        "command": "make test-hostile",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit.stdout.strip(),
        "seed": SEED,
        "machine": machine,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "accepted": dict(ACCEPTED),
        "classes": {tally.name: _row(tally) | {"outcomes": tally.counts, "faults": tally.faults} for tally in tallies},
    }


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what is damaged: a bundle of every kind of file, its ``.scmz``, runs, data and a pickle.

    ``SCM_HOSTILE_MATERIAL`` names a folder that keeps it from one session to the next.
    """
    kept = os.environ.get("SCM_HOSTILE_MATERIAL")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("material")
    if not any(folder.glob("*")):
        made = folder.with_name(f".{folder.name}.{os.getpid()}")
        made.mkdir(parents=True)
        _make_material(made)
        os.replace(made, folder)
    return folder


def run_verb(folder: Path, *arguments: str) -> None:
    """Run a verb of ``scm-export`` in a folder."""
    command = [sys.executable, "-m", "scm_sdk.export.cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=worker_environment(folder), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, f"{arguments}: {done.stderr}"


def _make_material(folder: Path) -> None:
    from helpers.edm_pickles import write_edm_pickle

    rng = np.random.default_rng(0)
    kind = np.arange(256) % 3
    images = rng.integers(0, 256, (256, 8, 8, 1), dtype=np.uint8)
    images[kind == 1, :4] = 255
    np.savez(folder / "data.npz", images=images, kind=kind, kind_names=np.array(["a", "b", "c"]))
    write_edm_pickle(folder / "network.pkl")
    run_verb(folder, "train", "-o", "teacher", *TRAIN)
    run_verb(folder, "distill", "-o", "student", *DISTILL)
    _leave_half_a_run(folder)
    _perturb(folder / "student", folder / "model")
    run_verb(folder, "onnx", "model", "-o", "plain")
    shutil.copytree(folder / "plain", folder / "bundle")
    run_verb(folder, "precision", "bundle")
    run_verb(folder, "quantize", "bundle", "--num-samples", "4")
    run_verb(folder, "engine", "bundle", "--target", "l4", "--precision", "fp16", "--steps", "1")
    run_verb(folder, "validate", "bundle", "--num-seeds", "4", "--batch", "1")
    run_verb(folder, "bundle", "card", "bundle")
    run_verb(folder, "bundle", "pack", "bundle", "-o", "bundle.scmz")
    run_verb(folder, "bundle", "pack", "plain", "-o", "plain.scmz")


def _perturb(source: Path, target: Path) -> None:
    """Save a model with each weight moved: layers that start at zero would hide damage to those before them."""
    import torch

    from scm_sdk.model.consistency import ConsistencyModel

    model = ConsistencyModel.from_pretrained(source)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
    model.save_pretrained(target)


def _leave_half_a_run(folder: Path) -> None:
    """Train until the state of iteration 2 of 3 is on disk."""
    from helpers.killing import command, fork

    state = folder / "half-run/state.safetensors"

    def train() -> None:
        def end(event: str, _: object) -> None:
            if event != "os.kill" and state.exists():
                os.kill(os.getpid(), signal.SIGKILL)

        import torch

        torch.set_num_threads(1)  # as the others: another number rounds otherwise
        sys.addaudithook(end)
        os.chdir(folder)
        command(["train", "-o", "half-run", *TRAIN])()

    child = fork(train, output=folder / "half-run.log")
    assert child.wait() == -signal.SIGKILL, (folder / "half-run.log").read_text("utf-8")
