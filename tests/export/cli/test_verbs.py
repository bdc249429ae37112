"""``scm-export`` as users call it: every verb on a tiny model, every exit code, one line per error."""

import json
from functools import cache
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from helpers.commands import run
from scm_sdk._util.processor import BF16_CLASSES, INT8_CLASSES, cpu_class
from scm_sdk.export.cli import main

VERBS = sorted(main.commands)


def one_line(result):
    """The error is one line on stderr, without a traceback."""
    text = result.stderr.strip().splitlines()[-1]
    assert text.startswith("Error: ") and "Traceback" not in result.output
    return text


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """Teacher, student and bundle of 8x8 noise in three classes, made by the commands."""
    root = tmp_path_factory.mktemp("street")
    rng = np.random.default_rng(0)
    kinds = np.array(["a", "b", "c"])
    np.savez(
        root / "data.npz", images=rng.integers(0, 256, (12, 8, 8, 1), np.uint8), k=np.arange(12) % 3, k_names=kinds
    )
    common = ["--data", root / "data.npz", "--label", "k", "--iterations", 4, "--batch-size", 4, "--sample-every", 4]
    run("train", "-o", root / "teacher", "--preset", "tiny", *common)
    run("distill", "-o", root / "student", "--teacher", root / "teacher", *common)
    run("onnx", root / "student", "-o", root / "bundle", "--max-batch", 4)
    return root


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    assert "Usage:" in run(verb, "-h").output


def test_version_and_unknown_verb():
    from scm_sdk import __version__

    assert __version__ in run("--version").output
    assert "No such command" in run("fly", code=2).output


def test_training_leaves_a_checkpoint_a_log_and_pictures(street):
    for run_folder in ("teacher", "student"):
        files = {p.name for p in (street / run_folder).iterdir()}
        assert {"config.json", "diffusion_pytorch_model.safetensors", "log.jsonl", "train.json", "samples"} <= files
        with Image.open(street / run_folder / "samples" / "000004.png") as picture:
            assert picture.size[0] > 100


def test_dry_run_prints_the_resolved_config(street):
    out = run(
        "distill", "-o", street / "never", "--teacher", street / "teacher", "--data", street / "data.npz",
        "--label", "k", "--dry-run",
    )  # fmt: skip
    config = json.loads(out.stdout)
    assert config["objective"] == "scd" and config["network"]["num_classes"] == 3
    assert not (street / "never").exists()


def test_sct_needs_and_takes_initial_weights(street, tmp_path):
    common = ["--data", street / "data.npz", "--label", "k", "--iterations", 2, "--batch-size", 4]
    run("distill", "-o", tmp_path / "sct", "--no-teacher", "--init", street / "teacher", *common, "--sample-every", 0)
    assert json.loads((tmp_path / "sct" / "train.json").read_text("utf-8"))["objective"] == "sct"
    target = ["--teacher", street / "teacher", "--init", street / "student"]
    run("distill", "-o", tmp_path / "more", *target, *common, "--sample-every", 0)
    more = json.loads((tmp_path / "more" / "train.json").read_text("utf-8"))
    assert (more["objective"], more["teacher"], more["init_from"]) == ("scd", *map(str, target[1::2]))
    run(
        "distill", "-o", tmp_path / "cd", *target[:2], *common, "--discrete-step", 0.3, "--anchor", 0.5,
        "--stable-targets", "--mid-time", 0.7, "--sample-every", 0,
    )  # fmt: skip
    discrete = json.loads((tmp_path / "cd" / "train.json").read_text("utf-8"))
    assert [discrete[key] for key in ("objective", "discrete_step", "mid_time")] == ["cd", 0.3, 0.7]
    assert discrete["anchor"]["weight"] == 0.5
    run(
        "distill", "-o", tmp_path / "ends", *target[:2], *common, "--trajectory-steps", 3, "--huber", 0.03,
        "--vsd", 2, "--vsd-weighting", "error", "--sample-every", 0,
    )  # fmt: skip
    ends = json.loads((tmp_path / "ends" / "train.json").read_text("utf-8"))
    assert (ends["objective"], ends["trajectory"]) == ("trajectory", {"steps": 3, "huber": 0.03})
    assert (ends["vsd"]["weight"], ends["vsd"]["weighting"]) == (2, "error")
    assert "leave out --discrete-step and --vsd-only" in one_line(
        run("distill", "-o", tmp_path / "x", *target[:2], "--discrete-step", 0.3, "--trajectory-steps", 3, code=2)
    )
    assert "leave out --no-teacher and --vsd-only" in one_line(
        run("distill", "-o", tmp_path / "x", *target[:2], "--discrete-step", 0.3, "--vsd-only", code=2)
    )
    assert "exactly one of --teacher" in one_line(run("distill", "-o", tmp_path / "x", code=2))
    assert "needs --init" in one_line(run("distill", "-o", tmp_path / "x", "--no-teacher", code=2))


def test_train_goes_on_from_a_checkpoint_with_stable_targets(street, tmp_path):
    common = ["--preset", "tiny", "--data", street / "data.npz", "--label", "k", "--iterations", 2, "--sample-every", 0]
    run("train", "-o", tmp_path / "more", "--init", street / "teacher", "--stable-targets", *common)
    config = json.loads((tmp_path / "more" / "train.json").read_text("utf-8"))
    assert config["stable_targets"] and config["init_from"] == str(street / "teacher")


def test_onnx_dry_run_and_existing_target(street, tmp_path):
    dry = run("onnx", street / "student", "-o", tmp_path / "b", "--steps", 2, "--dry-run", "--json")
    (spec,) = json.loads(dry.stdout)
    assert spec["times"][1] == 1.1 and not (tmp_path / "b").exists()
    one_line(run("onnx", street / "student", "-o", street / "bundle", "--steps", 1, code=6))


def test_generate_one_grid_many_files_and_json(street, tmp_path):
    arguments = ["--num-images", 4, "--class-labels", "b", "--seed", 7]
    out = json.loads(run("generate", street / "bundle", "-o", tmp_path / "g.png", *arguments, "--json").stdout)
    assert out["seeds"] == [7, 8, 9, 10]
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.width >= 2 * 8 * 4
    run("generate", street / "bundle", "-o", tmp_path / "many", *arguments, "--backend", "torch", "--steps", 1)
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["07.png", "08.png", "09.png", "10.png"]


def test_generate_plan(street):
    assert "onnxruntime" in run("generate", street / "bundle", "--plan").stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--class-labels", "z"], "class label is 'z'"),
        (["--class-labels", "9"], "class label is 9"),
        (["--num-images", "0"], "--num-images"),
        (["--steps", "3"], "num_inference_steps is 3|3"),
        (["--backend", "abacus"], "abacus"),
    ],
)
def test_generate_refuses_in_one_line(street, tmp_path, arguments, message):
    import re

    result = run(
        "generate", street / "bundle", "-o", tmp_path / "no.png", "--backend", "onnxruntime", *arguments, code=2
    )
    assert re.search(message, one_line(result))
    assert not (tmp_path / "no.png").exists()


def test_validate_records_and_gates(street):
    report = json.loads(run("validate", street / "bundle", "--json").stdout)
    results = report["parity"]
    assert report["latency"] == [], "no budgets"
    ran = [(r["num_inference_steps"], r["candidate_backend"]) for r in results if r["required"]]
    assert ran == [(1, "onnxruntime"), (1, "openvino"), (2, "onnxruntime"), (2, "openvino")]
    assert all(r["passed"] for r in results if r["required"])
    assert {int(b) for b in results[0]["by_batch"]} == {1, 3, 4}
    again = ("validate", street / "bundle", "--backend", "onnxruntime", "--steps", 2)
    failed = run(*again, "--threshold", 0, code=3)
    assert "expected at most 0.0e+00" in one_line(failed)
    assert "looser than the derived" in one_line(run(*again, "--threshold", 1, code=2))
    loose = run(*again, "--threshold", 1, "--reason", "a test")
    assert "reason: a test" in loose.stderr
    run(*again)


def test_bench_table_json_and_budget(street):
    one = ["bench", street / "bundle", "--backend", "onnxruntime", "--batch", 1, "--rounds", 10]
    table = run(*one, "--threads", 1).stdout
    title, *lines = table.splitlines()
    assert title == "batch 1, 10 rounds, ms; speed-up over onnxruntime with its 95 % interval"
    assert lines[0].split() == ["backend", "precision", "load", "first", "median", "p95", "images/s", "speed-up"]
    assert lines[1].split()[:2] == ["onnxruntime", "fp32"] and len(lines) == 2
    rows = json.loads(run("bench", street / "bundle", "--batch", 1, "--rounds", 10, "--json").stdout)
    timings = rows[0]["timings"]
    assert all(
        timing["name"] in (timing["backend"], f"{timing['backend']}:{timing['precision']}") for timing in timings
    )
    assert {timing["artifact"] for timing in timings} == {"denoiser", "onnx/fp32/2step/model.onnx"}
    names = [timing["name"] for timing in timings]
    assert [name for name in names if not name.endswith(":bf16")] == ["torch", "onnxruntime", "openvino"]
    over = run(*one, "--budget", "median=1us@b1", code=4)
    assert "budget missed: onnxruntime, batch 1: median" in over.stdout and "at most 0.001 ms" in over.stdout
    met = run(*one, "--budget", "onnxruntime:p95=9s@b1").stdout
    assert "budget met: onnxruntime, batch 1: p95" in met and "missed" not in met
    assert "not measured" in one_line(run(*one, "--budget", "p95=1s@b8", code=2))


@pytest.mark.parametrize("here", ["avx2", "avx512_vnni", "avx512_bf16", "amx_bf16"])
def test_bench_times_bf16_where_the_class_of_cpu_computes_it(street, here, monkeypatch):
    from scm_sdk.export.cli.bench import _usual
    from scm_sdk.inference import selection
    from scm_sdk.inference.backends import BackendInfo
    from scm_sdk.inference.sources import open_source

    source, refused = open_source(street / "bundle"), {"torch"}
    monkeypatch.setattr(selection, "cpu_class", lambda: here)
    monkeypatch.setattr(
        BackendInfo, "cannot_compute", lambda info, precision: "not here" if info.library in refused else ""
    )
    assert ("openvino:bf16" in _usual(source, 2, None)) == (here in BF16_CLASSES)
    assert "torch:bf16" not in _usual(source, 2, None), "the library is asked, too"
    refused.clear()
    assert ("torch:bf16" in _usual(source, 2, None)) == (here in BF16_CLASSES)
    assert "onnxruntime:bf16" not in _usual(source, 2, None), "it has no such kernels"


def test_auto_goes_by_what_bench_measured(street):
    from scm_sdk import Generator

    said = " ".join(run("bench", street / "bundle", "--batch", 2, "--rounds", 10, "--steps", 2).stderr.split())
    with Generator.from_pretrained(street / "bundle", num_inference_steps=2) as gen:
        rows = gen.plan().accepted
        assert all(row.measured is not None and row.measured.batch == 2 for row in rows)
        assert rows[0].measured == min(row.measured for row in rows)
        assert f'backend="auto" takes {rows[0].backend} {rows[0].precision}: {rows[0].reason}' in said


def test_inspect_and_verify(street):
    assert "1.1000" in run("inspect", street / "bundle").stdout
    manifest = json.loads(run("inspect", street / "bundle", "--json").stdout)
    assert {a["format"] for a in manifest["artifacts"]} == {"safetensors", "onnx"}
    assert json.loads(run("bundle", "verify", street / "bundle", "--json").stdout)["files"] == len(manifest["files"])


def test_damage_is_exit_6(street, tmp_path):
    import shutil

    copy = shutil.copytree(street / "bundle", tmp_path / "copy")
    graph = copy / "onnx" / "fp32" / "1step" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    assert "1step/model.onnx" in one_line(run("bundle", "verify", copy, code=6))
    one_line(run("generate", copy, "--backend", "onnxruntime", "--steps", 1, "-o", tmp_path / "x.png", code=6))
    one_line(run("inspect", tmp_path / "absent", code=6))


@pytest.fixture(scope="module")
def trials_run_once():
    """Keep the result of each backend's trial, which takes seconds, for the next ``doctor``."""
    module = import_module("scm_sdk.export.cli.doctor")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_try", "_gains"):
            patch.setattr(module, name, cache(getattr(module, name)))
        yield


@pytest.mark.usefixtures("trials_run_once")
def test_doctor():
    report = json.loads(run("doctor", "--json").stdout)
    assert report["backends"]["onnxruntime"] == "runs here" and report["libraries"]["torch"]
    assert report["cpu_class"] == cpu_class()
    gains = report["speed_over_fp32"]
    assert set(gains["torch"]) == ({"bf16"} if cpu_class() in BF16_CLASSES else set()) and gains["onnxruntime"] == {}
    assert ("int8" in gains.get("openvino", {})) == ("openvino" in gains and cpu_class() in INT8_CLASSES)
    assert all(gain > 0 for each in gains.values() for gain in each.values())
    assert "backend torch: runs here" in run("doctor").stdout


@pytest.mark.usefixtures("trials_run_once")
def test_doctor_of_a_bundle_says_what_would_run_and_why_not(street):
    table = run("doctor", street / "bundle").stdout
    assert "1 step; * is what" in table and "2 steps; * is what" in table
    assert "*  " in table and "onnx/fp32/2step/model.onnx" in table
    plans = json.loads(run("doctor", street / "bundle", "--json").stdout)["plans"]
    assert set(plans) == {"1", "2"} and sum(row["chosen"] for row in plans["2"]) == 1
    run("doctor", street / "nothing", code=6)


def test_nan_in_the_data_leaves_no_run(tmp_path):
    images = np.zeros((4, 8, 8, 1), np.float32)
    images[2, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", images=images)
    result = run("train", "-o", tmp_path / "run", "--preset", "tiny", "--data", tmp_path / "nan.npz", code=1)
    assert "image 2" in one_line(result) and not (tmp_path / "run").exists()


def test_unknown_preset(tmp_path):
    assert "expected one of avatars16, pixels16" in one_line(
        run("train", "-o", tmp_path / "r", "--preset", "huge", code=2)
    )
