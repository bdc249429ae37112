"""Every hint on installing is a command that works: it names packages of the index, and never scm-sdk itself."""

import ast
import importlib.metadata
import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from helpers.project_modules import MODULES
from scm_sdk._util import lazy
from scm_sdk.bundle.card import model_card
from scm_sdk.errors import BackendUnavailable
from scm_sdk.export.cli import main
from scm_sdk.export.cli.libraries import LIBRARIES
from scm_sdk.spec import SamplerSpec

EXTRAS = importlib.metadata.metadata("scm-sdk").get_all("Provides-Extra") or []
DECLARED = {Requirement(line).name for line in importlib.metadata.requires("scm-sdk") or ()} - {"scm-sdk"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_hint_names_what_the_extra_brings(extra: str) -> None:
    command = lazy.install_command(extra)
    if command.startswith("no package"):
        assert extra == "tensorrt-rtx"  # the one extra with markers of the system
        return
    program, verb, *wanted = shlex.split(command)
    assert (program, verb) == ("pip", "install") and wanted
    parsed = [Requirement(word) for word in wanted]  # the parser that pip uses
    assert {each.name for each in parsed} <= DECLARED
    assert not any(each.extras or each.marker for each in parsed)


def test_a_hint_is_what_an_extra_says() -> None:
    assert re.fullmatch(r"pip install 'onnxruntime>=[\d.]+'", lazy.install_command("onnxruntime"))
    assert re.fullmatch(r"pip install --pre 'torch>=[\d.]+' 'filelock>=[\d.]+'", lazy.install_command("train", "--pre"))


def test_an_error_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match=r"a test needs nowhere.*pip install 'openvino>="):
        lazy.require("nowhere", extra="openvino", purpose="a test")
    monkeypatch.setattr(lazy, "_DISTRIBUTION", "not-installed-anywhere")
    with pytest.raises(BackendUnavailable, match=r"pip install --editable '\.\[openvino\]', in the checkout"):
        lazy.require("nowhere", extra="openvino", purpose="a test")


@pytest.fixture
def old_onnxscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the metadata of an old onnxscript be found before those of the one that is installed."""
    about = tmp_path / "onnxscript-0.5.0.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: onnxscript\nVersion: 0.5.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("old_onnxscript")
def test_a_library_that_is_too_old_is_named() -> None:
    pytest.importorskip("onnxscript")
    assert list(lazy.outdated("numpy", "onnxscript", "nowhere", "PIL")) == ["onnxscript"]
    assert re.fullmatch(r"0\.5\.0, expected >=[\d.]+", lazy.outdated("onnxscript")["onnxscript"])
    with pytest.raises(
        BackendUnavailable, match=r"onnxscript 0\.5\.0, expected >=.*pip install --upgrade .*'onnxscript"
    ):
        from scm_sdk.export.graph.trace import translate

        translate(None, [], "F")  # type: ignore[arg-type]  # before it is looked at
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert json.loads(done.stdout)["outdated"].keys() == {"onnxscript"}


def _describe(folder: Path, name: str, version: str, *files: str) -> None:
    """Write what an installation leaves of a distribution; without a version, of one with incomplete metadata."""
    about = folder / f"{name.replace('-', '_')}-1.dist-info"
    about.mkdir()
    stated = f"Version: {version}\n" if version else ""
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n{stated}", encoding="utf-8")
    tops = {file.partition("/")[0].removesuffix(".py") for file in files}
    (about / "top_level.txt").write_text("\n".join(sorted(tops)), encoding="utf-8")  # Python 3.10 reads no RECORD
    (about / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


@pytest.mark.filterwarnings("error")
def test_the_version_is_that_of_the_distribution_that_holds_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _describe(tmp_path, "a-part", "1.0", "scm_shared/other/__init__.py")
    _describe(tmp_path, "b-part", "2.0", "scm_shared/wanted/__init__.py")
    _describe(tmp_path, "c-part", "3.0", "scm_shared/wanted_too/__init__.py")
    _describe(tmp_path, "scm-named-otherwise", "4.0", "scm_module.py")
    _describe(tmp_path, "scm-no-version", "", "scm_no_version/__init__.py")
    (tmp_path / "scm_left-1.dist-info").mkdir()
    _describe(tmp_path, "scm-folder", "5.0", "scm_other_folder/__init__.py")
    (tmp_path / "scm_folder-1.dist-info").rename(tmp_path / "another-1.dist-info")
    monkeypatch.syspath_prepend(tmp_path)
    modules = ["scm_shared.wanted", "scm_shared.other", "scm_module", "scm_no_version", "scm_left", "scm_other_folder"]
    assert [lazy.installed_version(m) for m in modules] == ["2.0", "1.0", "4.0", "unknown", "unknown", "unknown"]
    assert lazy.distribution_version("scm-no-version", "scm-left", "b-part") == "2.0"
    assert lazy.outdated(*modules) == {}
    _describe(tmp_path, "onnxscript", "of our own", "onnxscript/__init__.py")
    assert lazy.installed_version("onnxscript") == "of our own" and lazy.outdated("onnxscript") == {}


def test_nothing_here_is_too_old() -> None:
    assert lazy.outdated("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "cuda.bindings", "click") == {}


def test_doctor_lists_every_library_that_the_code_asks_for() -> None:
    asked = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                (name,) = node.args
                (extra,) = (word.value for word in node.keywords if word.arg == "extra")
                if isinstance(name, ast.Constant) and isinstance(extra, ast.Constant):
                    asked.add((str(name.value).partition(".")[0], str(extra.value)))
    assert {("ftfy", "prompts"), ("tokenizers", "prompts"), ("torch", "torch")} <= asked
    assert {name for name, _ in asked} <= {name.partition(".")[0] for name in LIBRARIES}
    assert {extra for _, extra in asked} <= {extra for extra, _ in LIBRARIES.values()} <= set(EXTRAS)


def test_no_other_text_hints_at_the_index() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "scm-sdk[" not in node.value, f"{module}:{node.lineno}: write install_command(extra)"
                assert not re.search(r"pip install.*scm-sdk\b", node.value), f"{module}:{node.lineno}"


def test_a_card_names_the_wheel() -> None:
    card = model_card("toy", [SamplerSpec(times=(1.5,), sample_shape=(3, 8, 8))], {})
    (wheel,) = re.findall(r"^pip install 'dist/(.*\.whl)\[torch,hub\]'$", card, re.MULTILINE)
    name, version, *tags = wheel.removesuffix(".whl").split("-")
    assert (name, version, tags) == ("scm_sdk", importlib.metadata.version("scm-sdk"), ["py3", "none", "any"])
