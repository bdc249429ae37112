"""Training that is killed at a write, or gets a signal, resumes to the same files as uninterrupted training."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scm_sdk.model.consistency import ConsistencyModel

WORKER = Path(__file__).resolve().parents[1] / "helpers" / "killed_worker.py"
CLI = (sys.executable, "-m", "scm_sdk.export.cli")


def arguments(verb: str, out: Path, npz: Path, *more: str) -> list[str]:
    length = ("--iterations", "3", "--checkpoint-every", "2", "--sample-every", "2", "--batch-size", "4")
    return [verb, "-o", str(out), "--data", str(npz), "--label", "kind", *length, *more]


@pytest.mark.parametrize(
    ("verb", "stride"),
    [
        ("train", 4),
        ("distill", 5),
        pytest.param("train", 1, marks=pytest.mark.slow),
        pytest.param("distill", 1, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_write_changes_nothing(verb: str, stride: int, npz: Path, tmp_path: Path) -> None:
    teacher = arguments("train", tmp_path / "teacher", npz, "--preset", "tiny")
    more = ("--preset", "tiny", "--ema-profile", "0.1", "--ema-every", "2")
    if verb == "distill":
        more = ("--teacher", str(tmp_path / "teacher"))
    run = tmp_path / "run"
    job = {"before": [teacher], "command": arguments(verb, run, npz, *more), "folder": str(run), "stride": stride}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, WORKER, tmp_path / "job.json"], capture_output=True, encoding="utf-8", timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    whole: dict[str, str] = found["whole"]
    assert {"state.safetensors", "log.jsonl", "samples/000003.png", "config.json"} < whole.keys()
    assert len(found["after"]) * stride > 20, "every rename and every fsync is one"
    for event, files in found["after"].items():
        differing = sorted(name for name in files.keys() | whole.keys() if files.get(name) != whole.get(name))
        assert not differing, f"killed at event {event}"


def test_sigterm_saves_and_ends_as_one_that_was_terminated(npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    length = ["--iterations", "100000", "--checkpoint-every", "100000", "--sample-every", "0"]
    command = [*CLI, "train", "-o", str(out), "--data", str(npz), "--preset", "tiny", *length, "--batch-size", "4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
    deadline = time.monotonic() + 300
    while not (out / "log.jsonl").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    done = ConsistencyModel.from_pretrained(out).config.provenance["iteration"]
    assert (out / "state.safetensors").exists() and f"Saved after iteration {done}" in err
    assert not list(out.rglob(".*.partial"))
