"""Engines: real ones, built on this CPU, and every way in which building one can fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from scm_sdk.build_record import BuildRecord
from scm_sdk.bundle import Bundle
from scm_sdk.errors import (
    BackendUnavailable,
    ConfigError,
    ExportError,
    IncompatibleEngineError,
    IntegrityError,
    ScmError,
    UnsupportedGraphError,
)
from scm_sdk.export import engine_cache
from scm_sdk.export.build_errors import explain
from scm_sdk.export.census import Census, doubts, mismatches, parse_kernels, planned_census, take_census
from scm_sdk.export.cli import main
from scm_sdk.export.engine import build_engine
from scm_sdk.export.engine_options import EngineOptions
from scm_sdk.export.engines import add_engines
from scm_sdk.export.precision import default_plan
from scm_sdk.export.quantized_variants import QuantizeOptions, add_int8
from scm_sdk.export.variants import add_precision
from scm_sdk.export.write import read_model, write_model
from scm_sdk.targets import resolve_target, resolve_targets

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 Linux and Windows")


@pytest.fixture(scope="module")
def graphs(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with 1-step graphs of all precisions, for reading."""
    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("engines") / "bundle"))
    add_precision(path, default_plan("fp16"), steps=[1], num_samples=1)
    add_precision(path, default_plan("bf16"), steps=[1], num_samples=1)
    add_int8(path, QuantizeOptions(num_samples=4), steps=[1])
    return path


def graph(graphs: Path, precision: str) -> Path:
    return graphs / f"onnx/{precision}/1step/model.onnx"


def options(*capabilities: str, **changes) -> EngineOptions:
    return EngineOptions(**({"compute_capabilities": capabilities or ("8.6",), "batch": (1, 2, 5)} | changes))


def built(record: BuildRecord) -> Census:
    assert record.census["built"] is not None and record.census["mismatches"] == []
    return Census(**record.census["built"])


ALL = ("7.5", "8.0", "8.6", "8.9", "12.0")


@pytest.mark.parametrize(
    ("precision", "capabilities", "kind"),
    [
        *[pytest.param("fp16", (c,), "Half", id=f"fp16-{c}") for c in ALL],
        pytest.param("fp16", ALL, "Half", id="fp16-all-in-one"),
        *[pytest.param("int8", (c,), "Int8", id=f"int8-{c}") for c in ALL[1:]],
        *[pytest.param("bf16", (c,), "BFloat16", id=f"bf16-{c}") for c in ("8.0", "12.0")],
        *[pytest.param("fp32", (c,), "Float", id=f"fp32-{c}") for c in ("8.0", "8.9")],
    ],
)
def test_what_is_built_is_what_the_graph_asks_for(graphs, tmp_path, precision, capabilities, kind) -> None:
    record = build_engine(graph(graphs, precision), tmp_path / "engine", options(*capabilities))
    census = built(record)
    planned, _, _ = planned_census(read_model(graph(graphs, precision)))
    assert census.convolutions == planned.convolutions and set(census.convolutions) >= {kind}
    assert (census.attention, census.attention_fused) == (planned.attention, planned.attention_fused)
    assert record.facts.compute_capabilities == capabilities and record.precision == precision
    assert BuildRecord.from_json((tmp_path / "engine/build.json").read_bytes()) == record
    engine = (tmp_path / "engine/model.engine").read_bytes()
    assert len(engine) == record.engine_bytes > 10_000
    assert record.seconds["build"] > 0 and record.peak_memory_bytes > 1e8 and record.facts.gpu == ""


def test_int8_for_turing_is_refused_since_it_would_run_in_half(graphs: Path, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 dequantizes convolutions for 7.5: nothing but the census would tell."""
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
    with pytest.raises(ExportError, match="weights are not beside it"):
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
    with pytest.raises(ConfigError, match=r"cannot build for compute capability 9\.0, expected one of 7\.5"):
        options("9.0")
    with pytest.raises(ConfigError, match="expected one GPU"):
        options("8.0", "8.6", flavour="tensorrt")
    with pytest.raises(ConfigError, match="expected 0 to 5"):
        options(optimization_level=9)
    with pytest.raises(ConfigError, match="Use --flavour tensorrt"):
        options(hardware_compatibility="ampere_plus")
    with pytest.raises(ConfigError, match="the sampler's largest is 5"):
        build_engine(graph(graphs, "fp16"), tmp_path / "engine", options(batch=(1, 2, 64)))
    with pytest.raises(ConfigError, match="compute_capabilities is empty"):
        EngineOptions(compute_capabilities=(), batch=(1, 1, 1))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("cudaError 35: CUDA driver version is insufficient for CUDA runtime version", BackendUnavailable, "no GPU"),
        ("Non-zero zero point is not supported.", UnsupportedGraphError, "shifted zero points"),
        ("input has type Int32 but must have type FP8", UnsupportedGraphError, "quantized biases"),
        ("Plugin not found, are the plugin name, version, and namespace correct?", UnsupportedGraphError, "operator"),
        ("ElementWiseOperation SUM must have same input types. But", UnsupportedGraphError, "mixes types"),
        ("Unable to load library: libnvinfer_lean.so.1", IncompatibleEngineError, "lean runtime"),
        ("graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed", BackendUnavailable, "only be built with a GPU"),
        ("something new", ExportError, "something new"),
    ],
)  # fmt: skip
def test_the_builders_words_are_explained(text: str, error: type[ScmError], message: str) -> None:
    found = (
        explain(["a first line that says little", text], doing="building x")
        if text != "something new"
        else explain([text], doing="building x")
    )
    assert type(found) is error and message in str(found) and str(found).startswith("building x failed")


def test_progress_is_reported_and_stops_the_build(graphs: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(ExportError, match="the build was cancelled in"):
        build_engine(
            graph(graphs, "fp16"), tmp_path / "engine", options(),
            progress=lambda *step: (seen.append(step), len(seen) < 5)[1],
        )  # fmt: skip
    assert len(seen) >= 5 and all(1 <= step <= total for _, step, total in seen)

    def interrupt(phase: str, step: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(graph(graphs, "fp16"), tmp_path / "engine", options(), progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_killed_build_leaves_nothing(graphs: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    before = {str(f): f.stat().st_mtime_ns for f in path.rglob("*")}
    code = (
        "import os, signal, sys\n"
        "from scm_sdk.export.engines import add_engines\n"
        "from scm_sdk.targets import resolve_targets\n"
        "kill = lambda *step: os.kill(os.getpid(), signal.SIGKILL)\n"
        "add_engines(sys.argv[1], resolve_targets(['l4']), precisions=['fp16'], on_build=lambda path: kill)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=120, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert {str(f): f.stat().st_mtime_ns for f in path.rglob("*")} == before
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]
    assert engine_cache.entries() == []
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

    entry = engine_cache.entries()[0]
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
    assert engine_cache.entries() == []
    Bundle.open(path), Bundle.open(other)  # they hold their own


def test_garbage_is_what_was_not_used_for_long(graphs: Path) -> None:
    for capability in ("8.6", "8.9"):
        engine_cache.cached_engine(graph(graphs, "fp16"), options(capability))
    old = engine_cache.entries()[0]
    long_ago = time.time() - 10 * 86400
    for file in old.folder.iterdir():
        os.utime(file, (long_ago, long_ago))
    assert [e.key for e in engine_cache.collect_garbage(max_age_days=5)] == [old.key]
    assert engine_cache.collect_garbage(max_bytes=10**9) == []
    (left,) = engine_cache.entries()
    (left.folder / "build.json").write_text("{")
    assert [e.problem() for e in engine_cache.collect_garbage()] == ["build.json cannot be read"]


def test_the_second_builder_waits_and_finds_it_made(graphs: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from scm_sdk.export.engine_cache import cached_engine\n"
        "from scm_sdk.export.engine_options import EngineOptions\n"
        "print(cached_engine(Path(sys.argv[1]), EngineOptions(compute_capabilities=('8.0',), batch=(1, 2, 5)))[1])\n"
    )
    command = [sys.executable, "-c", code, str(graph(graphs, "fp16"))]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(p.communicate(timeout=120)[0].strip() for p in both) == ["False", "True"]


def test_graphs_that_are_not_there(graphs: Path) -> None:
    with pytest.raises(ConfigError, match=r"has these graphs: .*expected fp8"):
        add_engines(graphs, resolve_targets(["l4"]), precisions=["fp8"])  # type: ignore[list-item]
    with pytest.raises(IncompatibleEngineError, match="this machine has no GPU"):
        add_engines(graphs, ())


def test_tensorrt_itself_is_missing_here_and_says_so(graphs: Path) -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(BackendUnavailable, match=r"pip install 'scm-sdk\[tensorrt\]'"):
            add_engines(graphs, resolve_targets(["h100"]), flavour="tensorrt")


def test_the_verb_builds_and_tells(graphs: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    run = CliRunner().invoke(main, ["engine", str(path), "--target", "a100", "--precision", "int8"])
    assert run.exit_code == 0, run.output
    assert "prefer tensorrt on the GPU" in run.stderr and "convolutions Int8" in run.stderr
    bad = CliRunner().invoke(main, ["engine", str(path), "--target", "h100"])
    assert bad.exit_code == 2 and "Build with --flavour tensorrt" in bad.stderr
    unknown = CliRunner().invoke(main, ["engine", str(path), "--target", "a1000"])
    assert unknown.exit_code == 2 and "a100" in unknown.stderr
    assert "h100, h200" in CliRunner().invoke(main, ["targets"]).output
    turing = CliRunner().invoke(main, ["engine", str(path), "--target", "t4", "--precision", "int8"])
    assert turing.exit_code != 0 and "TensorRT-RTX has no int8 kernels for t4 (7.5). Choose" in turing.stderr
    skipped: list[str] = []
    made = add_engines(path, resolve_targets(["t4"]), steps=[1], on_skip=skipped.append)
    assert [v.precision for v in made] == ["fp16"]
    assert {line.split(",")[0] for line in skipped} == {"fp32", "int8", "bf16"}
    listed = json.loads(CliRunner().invoke(main, ["targets", "--json"]).stdout)
    assert next(t for t in listed if t["name"] == "t4")["compute_capability"] == "7.5"


@pytest.mark.parametrize("name", ["a100", "A100", "sm_80", "sm80", "8.0", "80"])
def test_targets_have_many_names(name: str) -> None:
    assert resolve_target(name).compute_capability == "8.0"


@pytest.mark.parametrize("name", ["", "sm_99", "geforce", "8.05", "sm-8"])
def test_unknown_targets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a GPU such as .* or a compute capability"):
        resolve_target(name)


def test_no_kernels_means_nothing_is_claimed(graphs: Path) -> None:
    model = read_model(graph(graphs, "fp16"))
    assert take_census(model, ["a log without kernels"]) is None


def test_a_census_sees_a_convolution_in_the_wrong_type(graphs: Path) -> None:
    model = read_model(graph(graphs, "fp16"))
    planned, types, _ = planned_census(model)
    lines = [
        f"Name: {n}_myl0_1, LayerType: correlation, Inputs: [ {{ Name: x, Datatype: Float }}], "
        f"Constants: [ {{ Datatype: Float }}], Outputs: [ {{ Datatype: Half }}], TacticName: , "
        f"Metadata: [ONNX Layer: {n}]"
        for n in types
    ]
    census = take_census(model, lines)
    assert census is not None and census.convolutions == {"Float": len(types)}
    (wrong,) = mismatches(planned, census)
    assert f"{len(types)} convolutions run in another type" in wrong
    unfused = doubts(Census(convolutions={}, attention=2, attention_fused=2), census)
    assert unfused[-1].endswith("of 2 attention blocks are one kernel")
    assert str(census).startswith(f"{len(types)} of {len(types)} convolutions Float")
    (kernel, *_) = parse_kernels(lines)
    assert (
        kernel.kind == "correlation"
        and kernel.nodes == (next(iter(types)),)
        and np.all(kernel.input_types == ("Float",))
    )


def test_a_1x1_convolution_may_become_a_matrix_product(graphs: Path) -> None:
    """As TensorRT-RTX 1.7.1 builds the attention's projections of a network with 256 channels at 16x16."""
    model = read_model(graph(graphs, "fp16"))
    planned, types, _ = planned_census(model)
    lines = [
        f"Name: __myl_FcAdd_myl0_{i}, LayerType: runtime_fusion, Inputs: [ {{ Name: x, Datatype: Half }}], "
        f"Constants: [ {{ Datatype: Half }}], Outputs: [ {{ Datatype: Half }}], TacticName: , "
        f"Metadata: [ONNX Layer: {n}]__gemm_from_conv1x1"
        for i, n in enumerate(types)
    ]
    census = take_census(model, lines)
    assert census is not None and census.convolutions == planned.convolutions == {"Half": len(types)}


def tensorrt_line(names: list[str], data: str, weights: str, kind: str = "CaskConvolution") -> str:
    """A kernel as TensorRT 10's documentation and users' logs show it; written here, not run here."""
    tensor = f"Location: Device, Dimensions: [1,8,8,8], Format/Datatype: {data}"
    nodes = "\x1e".join(f"[ONNX Layer: {name}]" for name in names)
    return (
        f"Name: {' + '.join(names)}, LayerType: {kind}, Inputs: [ {{ Name: x, {tensor} }}], Outputs: [ {{ Name: y, "
        f'{tensor} }}], ParameterType: Convolution, Kernel: [3,3], OutMaps: 8, Groups: 1, Weights: {{"Type": '
        f'"{weights}", "Count": 576}}, Bias: {{"Type": "Float", "Count": 8}}, HasBias: 1, Activation: NONE, '
        f"TacticName: sm80_xmma_fprop_implicit_gemm, TacticValue: 0x9251329244d2a80b, StreamId: 0, Metadata: {nodes}"
    )


@pytest.mark.parametrize(
    ("data", "weights", "kind", "found"),
    [
        ("Half", "Half", "CaskConvolution", "Half"),
        ("Channel major FP16 format where channel % 8 == 0", "Half", "CaskConvolution", "Half"),
        ("Thirty-two wide channel vectorized row major Int8 format", "Int8", "CaskConvolution", "Int8"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "Int8", "CaskGemmConvolution", "Int8"),
        ("Row major linear FP32", "Float", "CaskFlattenConvolution", "Float"),
        ("Row major linear BF16 format", "BFloat16", "CaskGemmMatrixMultiply", "BFloat16"),
        ("Row major linear FP16 format", "Int8", "CaskConvolution", "Half"),
    ],
)
def test_tensorrts_own_lines_are_read(data: str, weights: str, kind: str, found: str) -> None:
    (kernel,) = parse_kernels([f"Layers:\n{tensorrt_line(['pre/act', 'a/conv'], data, weights, kind)}\n\nBindings:\nx"])
    assert kernel.computes_convolution and kernel.type == found
    assert kernel.nodes == ("pre/act", "a/conv"), "U+001E between them ends no line"
    (copy,) = parse_kernels([tensorrt_line(["a/conv"], data, weights, "Reformat")])
    assert not copy.computes_convolution


def test_what_no_kernel_names_is_a_doubt_and_a_wrong_type_a_mismatch(graphs: Path) -> None:
    model = read_model(graph(graphs, "int8"))
    planned, types, _ = planned_census(model)
    first, *others = types
    int8, half = ("Thirty-two wide channel vectorized row major Int8 format", "Int8"), ("Half", "Half")
    lines = [tensorrt_line([n], *(int8 if types[n] == "Int8" else half)) for n in others]
    census = take_census(model, ["Layers:\n" + "\n".join(lines)])
    assert census is not None and census.unseen == (first,) and mismatches(planned, census) == []
    assert doubts(planned, census)[0] == f"1 convolutions are named by no kernel ({first})"
    wrong = take_census(model, [*lines, tensorrt_line([first], "Row major linear FP32", "Float")])
    assert wrong is not None and wrong.odd == (f"{first}: Float, not {types[first]}",) and wrong.unseen == ()
    assert len(mismatches(planned, wrong)) == 1
