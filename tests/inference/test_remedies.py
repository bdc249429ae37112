"""What an error advises fits what was found: broken libraries, odd paths, graphs that a library cannot read."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.batching import PLAIN
from helpers.containers import run_python
from scm_sdk.bundle.manifest import ParityRecord
from scm_sdk.errors import BackendUnavailable, IntegrityError
from scm_sdk.inference.backends import open_backend
from scm_sdk.inference.generator import Generator

GRAPH = "onnx/fp32/2step/model.onnx"


@pytest.fixture
def graph(tmp_path: Path, linear_graph: Callable[..., None]) -> Path:
    linear_graph(tmp_path / "model.onnx", PLAIN)
    return tmp_path / "model.onnx"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def changed(change: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import onnx

        model = onnx.load(path)
        if change == "operator":
            model.graph.node[0].op_type = "Nope"
        elif change == "data":
            tensor = model.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="gone.bin")
        else:
            model.graph.input[0].type.tensor_type.ClearField("shape")
        path.write_bytes(model.SerializeToString())

    return write


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "damage, found",
    [
        (cut_short, r"model\.onnx: [A-Z]"),
        (changed("operator"), "Nope"),
        (changed("data"), r"gone\.bin"),
        (changed("shape"), "noise_0"),
    ],
    ids=["short", "operator", "data", "shape"],
)
def test_the_first_line_says_what_a_library_found_and_not_where_in_its_source(
    damage: Callable[[Path], None], found: str, backend: str, graph: Path
) -> None:
    pytest.importorskip(backend)
    damage(graph)
    with pytest.raises(IntegrityError, match=found) as raised:
        open_backend(backend, graph, PLAIN)
    text = str(raised.value)
    assert "\n" not in text and "Exception from" not in text and "[ONNXRuntimeError]" not in text and "src/" not in text


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_path_that_is_no_utf8_is_opened_or_called_that(backend: str, graph: Path) -> None:
    pytest.importorskip(backend)
    folder = Path(os.fsdecode(os.fsencode(graph.parent) + b"/caf\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    shutil.move(graph, folder)
    if backend == "openvino":
        open_backend(backend, folder / graph.name, PLAIN).close()
        return
    with pytest.raises(BackendUnavailable, match=r"caf\\xe9/model\.onnx is no UTF-8.* Rename the folder") as raised:
        open_backend(backend, folder / graph.name, PLAIN)
    str(raised.value).encode()


@pytest.mark.parametrize(
    "fault",
    ["ImportError('libx.so.1: cannot open')", "ImportError", "OSError('libx.so.1')", "AttributeError('_ARRAY')"],
)
def test_a_library_that_is_installed_and_broken(fault: str, linear_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever it raises; and ``auto`` names what could run in its place, which it does not take unasked."""
    pytest.importorskip("openvino")
    (tmp_path / "fake/onnxruntime").mkdir(parents=True)
    (tmp_path / "fake/onnxruntime/__init__.py").write_text(f"raise {fault}", encoding="utf-8")
    records = [
        ParityRecord(
            artifact=GRAPH, reference="denoiser", backend=backend, threshold=1, noise_floor=0, max_abs=0, num_samples=4,
            passed=True,
        )
        for backend in ("onnxruntime", "openvino")
    ]  # fmt: skip
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'fake')!r})\n"
        "from scm_sdk import Generator\n"
        "from scm_sdk.errors import BackendUnavailable\n"
        f"path = {str(linear_bundle(PLAIN, parity=records))!r}\n"
        "try: Generator.from_pretrained(path)\n"
        "except BackendUnavailable as exc: print(exc)\n"
        "print(Generator.from_pretrained(path, fallback='allow')(seed=1).info.backend)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    said, ran = done.stdout.splitlines()
    assert "onnxruntime, which is installed, but could not be imported (" in said and "()" not in said
    assert "--force-reinstall" in said and "but openvino can run it" in said and "fallback='warn'" in said
    assert ran == "openvino"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space")
def test_a_library_that_a_limit_keeps_from_loading_is_not_to_be_installed_first() -> None:
    code = (
        "import resource, scm_sdk.inference.generator\n"
        "from scm_sdk._util.lazy import require\n"
        "from scm_sdk.errors import BackendUnavailable\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))\n"
        "try: require('torch', extra='torch', purpose='this test')\n"
        "except BackendUnavailable as exc: print(exc)\n"
    )
    said = run_python(code).stdout
    assert "torch, which is installed, but could not be imported" in said
    assert "256 MiB of address space: raise the limit (ulimit -v)" in said


def test_a_backend_of_its_own_choice_has_nothing_to_name(linear_bundle: Callable[..., Path]) -> None:
    with pytest.raises(BackendUnavailable, match="cuda:99") as raised:
        Generator.from_pretrained(linear_bundle(PLAIN), backend="onnxruntime", device="cuda:99")
    assert "can run it" not in str(raised.value)
