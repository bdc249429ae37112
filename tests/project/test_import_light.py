"""``import scm_sdk`` costs nothing, and each public name is where the documentation says."""

import importlib
import json
import re
import subprocess
import sys
import textwrap

import pytest

import scm_sdk

BACKENDS = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "tensorrt"}
HEAVY = BACKENDS | {"numpy", "PIL", "click", "rich", "msgspec", "safetensors"}


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_is_light() -> None:
    loaded = loaded_after("import scm_sdk; scm_sdk.__version__; dir(scm_sdk)")
    assert "scm_sdk" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", ["SamplerSpec", "Bundle", "Client", "Generator"])
def test_names_that_serve_without_torch_load_no_backend(name: str) -> None:
    loaded = loaded_after(f"from scm_sdk import {name}")
    assert "msgspec" in loaded, "the name was really imported"
    assert not loaded & (BACKENDS | {"click"})


def test_the_command_is_light() -> None:
    loaded = loaded_after("import scm_sdk.export.cli")
    assert "click" in loaded
    assert not loaded & (BACKENDS | {"PIL"})


def test_the_public_names_are_these() -> None:
    errors = {name for name in scm_sdk.__all__ if re.search("Error|QueueFull|Unavailable|BackendFailure|Unknown", name)}
    assert sorted(set(scm_sdk.__all__) - errors) == [
        "Batcher", "Bundle", "Client", "ClientOutput", "ConsistencyModel", "Decoder", "EventLines", "Events",
        "Generator", "GeneratorOutput", "Identity", "Latency", "ModelConfig", "Parity", "Plan", "Precision",
        "ProgressBar", "PublicKey", "Sampler", "SamplerSpec", "TensorSpec", "__version__", "add_engines", "build_all",
        "check_model", "compare", "diffusers_scheduler", "draw_noise", "export_bundle", "import_flow_pipeline",
        "import_sana", "measure", "register_network", "validate",
    ]  # fmt: skip
    assert len(errors) == 17 and set(scm_sdk.__all__) <= set(dir(scm_sdk))


@pytest.mark.parametrize("name", scm_sdk.__all__)
def test_each_public_name_is_there_and_at_home(name: str) -> None:
    value = getattr(scm_sdk, name)
    if name == "__version__":
        assert value == importlib.import_module("scm_sdk._version").__version__
    else:
        if name == "Precision":  # a Literal
            return
        assert value.__name__ == name
        assert value.__doc__
        assert value is getattr(importlib.import_module(value.__module__), name)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'scm_sdk' has no attribute 'Generater'"):
        scm_sdk.Generater  # noqa: B018


def test_checkpoints_open_without_the_compiler_of_torch() -> None:
    """Importing it takes seconds of each process; random values and arithmetic on the meta device do."""
    code = """
        import sys, torch
        before = set(sys.modules)
        from scm_sdk.model.bounds import on_meta
        from scm_sdk.model.consistency import make_network
        from scm_sdk.model.networks.presets import PRESETS
        for make in PRESETS.values():
            with on_meta():
                make_network(make())
        print(sorted(name for name in set(sys.modules) - before if name in ("torch._dynamo", "sympy")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
