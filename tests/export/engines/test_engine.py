"""Engines: real ones, built on this CPU, and every way in which building one can fail."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from helpers.engine_helpers import graph, options
from helpers.recorded_events import Recorded
from scm_sdk._util.gpu import Gpu, current_gpu
from scm_sdk.bundle.engine_record import BuildRecord
from scm_sdk.engines.targets import resolve_target, resolve_targets
from scm_sdk.errors import (
    BackendUnavailable,
    ConfigError,
    ExportError,
    IncompatibleEngineError,
    ScmError,
    UnsupportedGraphError,
)
from scm_sdk.export.build_all import build_all
from scm_sdk.export.cli import main
from scm_sdk.export.engines import add
from scm_sdk.export.engines.add import add_engines
from scm_sdk.export.engines.census import Census, planned_census
from scm_sdk.export.engines.engine import build_engine
from scm_sdk.export.engines.options import EngineOptions
from scm_sdk.export.graph.io import read_model, write_model
from scm_sdk.spec import Precision

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 Linux and Windows")


def built(record: BuildRecord) -> Census:
    assert record.census["built"] is not None and record.census["mismatches"] == []
    return Census(**record.census["built"])


ALL = ("7.5", "8.0", "8.6", "8.9", "12.0")
KINDS = {"fp16": "Half", "int8": "Int8", "bf16": "BFloat16", "fp32": "Float"}
EACH_ONCE = {("fp16", "7.5"), ("int8", "8.0"), ("bf16", "8.6"), ("fp32", "8.9"), ("int8", "12.0")}
"""Every GPU and every precision; the other pairs of them take ``make test-slow``."""
assert {p for p, _ in EACH_ONCE} == set(KINDS) and {c for _, c in EACH_ONCE} == set(ALL)


@pytest.mark.parametrize(
    ("precision", "capabilities"),
    [
        pytest.param("fp16", ALL, id="fp16-all-in-one"),
        *[
            pytest.param(p, (c,), id=f"{p}-{c}", marks=[] if (p, c) in EACH_ONCE else pytest.mark.slow)
            for p in KINDS
            for c in ALL
            if p == "fp16" or c != "7.5"
        ],
    ],
)
def test_what_is_built_is_what_the_graph_asks_for(graphs, tmp_path, precision, capabilities) -> None:
    record = build_engine(graph(graphs, precision), tmp_path / "engine", options(*capabilities))
    census = built(record)
    planned, _, _ = planned_census(read_model(graph(graphs, precision)))
    assert census.convolutions == planned.convolutions and KINDS[precision] in census.convolutions
    assert census.products == planned.products
    assert (census.attention, census.attention_fused) == (planned.attention, planned.attention_fused)
    assert record.facts.compute_capabilities == capabilities and record.precision == precision
    assert BuildRecord.from_json((tmp_path / "engine/build.json").read_bytes()) == record
    engine = (tmp_path / "engine/model.engine").read_bytes()
    assert len(engine) == record.engine_bytes > 10_000
    assert record.seconds["build"] > 0 and record.peak_memory_bytes > 1e8 and record.facts.gpu == ""


def test_int8_for_turing_is_refused_since_it_would_run_in_half(graphs: Path, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 dequantizes convolutions for 7.5: only the census shows it."""
    with pytest.raises(ExportError, match=r"is not what the graph asks for: .* Half, not Int8.*--allow-mismatch"):
        build_engine(graph(graphs, "int8"), tmp_path / "engine", options("7.5"))
    assert not list(tmp_path.iterdir())
    record = build_engine(graph(graphs, "int8"), tmp_path / "engine", options("7.5"), allow_mismatch=True)
    assert "Half, not Int8" in record.census["mismatches"][0]


def test_a_failed_build_leaves_no_trace_in_the_next(graphs: Path, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1 keeps the failed build's target; the next engine was then one for Turing."""
    fresh = build_engine(graph(graphs, "int8"), tmp_path / "fresh", options("8.0"))
    with pytest.raises(UnsupportedGraphError):
        build_engine(graph(graphs, "fp32"), tmp_path / "failed", options("7.5"))
    again = build_engine(graph(graphs, "int8"), tmp_path / "again", options("8.0"))
    assert again.census == fresh.census
    assert again.engine_bytes == pytest.approx(fresh.engine_bytes, rel=1e-3), "the library repeats itself to 8 bytes"


@pytest.mark.parametrize(
    ("precision", "message"),
    [("fp32", "no float32 matrix product for Turing"), ("bf16", "cannot compute a type in the graph. BF16 needs")],
)
def test_what_turing_cannot_do(graphs: Path, tmp_path: Path, precision: str, message: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=message):
        build_engine(graph(graphs, precision), tmp_path / "engine", options("7.5"))
    assert not list(tmp_path.iterdir())


def test_the_peak_is_one_builds_own(graphs: Path, tmp_path: Path) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not reset a process's peak")
    ballast = np.ones(400 << 17)  # 400 MiB that are gone before the build
    before = ballast.nbytes
    del ballast
    record = build_engine(graph(graphs, "fp16"), tmp_path / "engine", options())
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    now = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
    assert 1e8 < record.peak_memory_bytes < now + before * 0.9


def test_the_shipped_model_becomes_an_engine_for_an_l4(newcomer: Path) -> None:
    """The one that users get, its attention included; the others here are of a tiny network."""
    (record,) = (newcomer / "scm-demo/avatars/engines").glob("tensorrt_rtx-sm89-fp16-1step/build.json")
    census = built(BuildRecord.from_json(record.read_bytes()))
    assert census.products == {"Half": 32} and not census.convolutions and not census.unseen
    assert census.attention_fused == census.attention == 5


def test_damaged_graphs(graphs: Path, tmp_path: Path) -> None:
    good = graph(graphs, "fp16").read_bytes()
    (tmp_path / "garbage.onnx").write_bytes(b"garbage" * 100)
    (tmp_path / "short.onnx").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("garbage", "short", "empty", "absent"):
        with pytest.raises(ExportError, match=rf"{name}\.onnx"):
            build_engine(tmp_path / f"{name}.onnx", tmp_path / "engine", options())
    assert not (tmp_path / "engine").exists()


def test_weights_that_are_missing_or_short(graphs: Path, tmp_path: Path) -> None:
    apart = tmp_path / "model.onnx"
    write_model(read_model(graph(graphs, "fp16")), apart, external_data_above=0)
    record = build_engine(apart, tmp_path / "engine", options())
    assert record.onnx_sha256 != record.engine_sha256
    data = tmp_path / "model.onnx_data"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match="cut short"):
        build_engine(apart, tmp_path / "short", options())
    data.unlink()
    with pytest.raises(ExportError, match="weights are not next to it"):
        build_engine(apart, tmp_path / "none", options())


def test_graphs_that_are_not_ours(graphs: Path, tmp_path: Path) -> None:
    foreign = read_model(graph(graphs, "fp16"))
    del foreign.metadata_props["scm_spec"]
    write_model(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(ExportError, match="has no scm_spec in its metadata"):
        build_engine(tmp_path / "foreign.onnx", tmp_path / "engine", options())
    odd = read_model(graph(graphs, "fp32"))
    (out,) = odd.graph.outputs
    out.name = "before"
    det = ir.Value(name="images", shape=out.shape, type=out.type)
    odd.graph.append(ir.Node("", "Det", [out], outputs=[det], name="odd"))
    odd.graph.outputs[0] = det
    (tmp_path / "odd.onnx").write_bytes(ir.to_proto(odd).SerializeToString())
    with pytest.raises(ExportError, match=r"an operator that this builder cannot run.*Det"):
        build_engine(tmp_path / "odd.onnx", tmp_path / "engine", options())


def test_options_are_checked_before_anything_is_built(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch is \(2, 1, 5\), expected 1 <= smallest"):
        options(batch=(2, 1, 5))
    with pytest.raises(ConfigError, match=r"compute capability 9\.0, expected one of 7\.5"):
        options("9.0")
    with pytest.raises(ConfigError, match="expected one GPU"):
        options("8.0", "8.6", flavor="tensorrt")
    with pytest.raises(ConfigError, match="expected 0 to 5"):
        options(optimization_level=9)
    with pytest.raises(ConfigError, match="Use --flavor tensorrt"):
        options(hardware_compatibility="ampere_plus")
    with pytest.raises(ConfigError, match="the sampler's largest is 5"):
        build_engine(graph(graphs, "fp16"), tmp_path / "engine", options(batch=(1, 2, 64)))
    with pytest.raises(ConfigError, match="compute_capabilities is empty"):
        EngineOptions(compute_capabilities=(), batch=(1, 1, 1))


def test_graphs_that_are_not_there(graphs: Path) -> None:
    with pytest.raises(ConfigError, match=r"has these graphs: .*expected int8-cpu"):
        add_engines(graphs, resolve_targets(["l4"]), precisions=["int8-cpu"])
    with pytest.raises(IncompatibleEngineError, match="this machine has no GPU"):
        add_engines(graphs, ())


@pytest.mark.parametrize(
    ("targets", "precisions", "error"),
    [(["l4", "h100"], ["fp16"], ConfigError), (["l4", "t4"], ["fp16", "fp32"], UnsupportedGraphError)],
)
def test_nothing_is_built_where_a_target_cannot_be(
    graphs: Path, targets: list[str], precisions: list[Precision], error: type[ScmError]
) -> None:
    events = Recorded()
    with pytest.raises(error, match=r"(h100|t4).*leave this target out"):
        add_engines(graphs, resolve_targets(targets), precisions=precisions, events=events)
    assert events.all == []


def test_tensorrt_itself_is_missing_here_and_says_so(graphs: Path) -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(BackendUnavailable, match=r"pip install 'tensorrt>="):
            add_engines(graphs, resolve_targets(["h100"]), flavor="tensorrt")


def test_what_cannot_be_built_is_said_before_the_export(unet_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"h100 \(9\.0\).*--flavor tensorrt"):
        build_all(unet_checkpoint, tmp_path / "bundle", targets=resolve_targets(["a100", "h100"]))
    monkeypatch.setattr(add, "load_flavor", lambda flavor, purpose: None)
    if current_gpu() is None:
        with pytest.raises(BackendUnavailable, match=r"engines for a100 were asked of TensorRT.*no GPU is here"):
            build_all(unet_checkpoint, tmp_path / "bundle", targets=resolve_targets(["a100"]), flavor="tensorrt")
    assert not (tmp_path / "bundle").exists()


def test_tensorrt_skips_what_only_another_gpu_can_build(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Gpu(index=0, name="NVIDIA A10", compute_capability="8.6", memory_bytes=1, driver="13.0")
    monkeypatch.setattr(add, "current_gpu", lambda: here)
    monkeypatch.setattr(add, "load_flavor", lambda flavor, purpose: None)
    events = Recorded()
    targets = resolve_targets(["a100", "l4"])
    assert add_engines(graphs, targets, flavor="tensorrt", skip_unbuildable=True, events=events) == []
    assert events.skipped[0] == "a100 (8.0): TensorRT builds on the GPU that runs the engine, this NVIDIA A10 is 8.6"
    assert len(events.skipped) == 2
    run = CliRunner().invoke(main, ["engine", str(graphs), "--target", "a100", "--flavor", "tensorrt"])
    assert run.exit_code == IncompatibleEngineError.exit_code and "skip  a100 (8.0): TensorRT builds on" in run.stderr


def test_the_verb_builds_and_tells(graphs: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    run = CliRunner().invoke(main, ["engine", str(path), "--target", "a100", "--precision", "int8"])
    assert run.exit_code == 0, run.output
    assert "prefer tensorrt on the GPU" in run.stderr and "convolutions Int8" in run.stderr
    bad = CliRunner().invoke(main, ["engine", str(path), "--target", "h100"])
    assert bad.exit_code == 2 and "Build with --flavor tensorrt" in bad.stderr
    unknown = CliRunner().invoke(main, ["engine", str(path), "--target", "a1000"])
    assert unknown.exit_code == 2 and "a100" in unknown.stderr
    assert "h100, h200" in CliRunner().invoke(main, ["targets"]).output
    turing = CliRunner().invoke(main, ["engine", str(path), "--target", "t4", "--precision", "int8"])
    assert turing.exit_code != 0 and "TensorRT-RTX has no int8 kernels for t4 (7.5). Choose" in turing.stderr
    events = Recorded()
    made = add_engines(path, resolve_targets(["t4"]), steps=[1], skip_unbuildable=True, events=events)
    assert [v.precision for v in made] == ["fp16"] and events.results == made
    assert {line.split(",")[0] for line in events.skipped} == {"fp32", "int8", "bf16"}
    listed = json.loads(CliRunner().invoke(main, ["targets", "--json"]).stdout)
    assert next(t for t in listed if t["name"] == "t4")["compute_capability"] == "7.5"


@pytest.mark.parametrize("name", ["a100", "A100", "sm_80", "sm80", "8.0", "80"])
def test_targets_have_many_names(name: str) -> None:
    assert resolve_target(name).compute_capability == "8.0"


@pytest.mark.parametrize("name", ["", "sm_99", "geforce", "8.05", "sm-8"])
def test_unknown_targets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a GPU such as .* or a compute capability"):
        resolve_target(name)
