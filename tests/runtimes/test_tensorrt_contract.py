"""Every TensorRT name that our code touches exists in 10.13, in 11.4 and in the installed TensorRT-RTX.

The names come from our sources, so that a new one is checked the day it is written. Those of the two TensorRT
versions are in ``golden/tensorrt_names.json``, with where they were read.
"""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    "export/engines/builder.py",
    "export/engines/engine.py",
    "runtimes/tensorrt/backend.py",
    "runtimes/tensorrt/context.py",
    "scm_sdk/engines/tensorrt.py",
]
NAMES = json.loads((ROOT / "tests/golden/tensorrt_names.json").read_text("utf-8"))
MODULES = {"trt", "self.trt", "self._trt", "library"}
OBJECTS = {
    "self.builder": "Builder",
    "self.network": "INetworkDefinition",
    "self.parser": "OnnxParser",
    "e": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "loaded": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "self._context": "IExecutionContext",
    "self._runtime_cache": "IRuntimeCache",
}
"""What our variables hold. ``config`` is one thing in the builder and another in the backend."""
RTX_ONLY = {
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("ComputeCapability", ""),
    ("ComputeCapability", "SM80"),
    ("ElementWiseOperation", ""),
    ("ElementWiseOperation", "SUM"),
    ("Runtime", "get_engine_validity"),
    ("EngineValidity", "INVALID"),
    ("ICudaEngine", "create_runtime_config"),
    ("CudaGraphStrategy", ""),
    ("EngineValidity", ""),
    ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
    ("DynamicShapesKernelSpecializationStrategy", ""),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeCache", "deserialize"),
    ("IRuntimeCache", "serialize"),
}
"""Touched only where the flavor is TensorRT-RTX."""


def touched() -> set[tuple[str, str]]:
    """(class, member) of everything that our code touches; a member "" is the class itself."""
    found = set()
    for name in FILES:
        objects = OBJECTS | {"config": "IBuilderConfig" if "builder" in name else "IRuntimeConfig"}
        if name.endswith("backend.py"):
            del objects["context"]  # an ExecutionContext of ours
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            if owner in MODULES and node.attr[0].isupper():
                found.add((node.attr, ""))
            elif owner.rpartition(".")[0] in MODULES and owner.rpartition(".")[2][0].isupper():
                found.add((owner.rpartition(".")[2], node.attr))
            elif owner in objects and not node.attr.startswith("_"):
                found.add((objects[owner], node.attr))
    return found


TOUCHED = sorted(touched())


def test_the_search_sees_our_code() -> None:
    assert len(TOUCHED) > 45
    for expected in (
        ("Builder", "build_serialized_network"),
        ("IExecutionContext", "execute_async_v3"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("OnnxParser", "parse_from_file"),
        ("ICudaEngine", "device_memory_size_v2"),
        ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ):
        assert expected in TOUCHED


@pytest.mark.parametrize("version", ["10.13", "11.4"])
def test_tensorrt_has_every_name(version: str) -> None:
    classes = NAMES[version]
    missing = [
        (owner, member)
        for owner, member in TOUCHED
        if (owner, member) not in RTX_ONLY and (owner not in classes or (member and member not in classes[owner]))
    ]
    assert not missing, f"TensorRT {version} lacks {missing}"


def test_tensorrt_rtx_has_every_name() -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx")
    missing = [
        (owner, member)
        for owner, member in TOUCHED
        if not hasattr(trt, owner) or (member and not hasattr(getattr(trt, owner), member))
    ]
    assert not missing, f"TensorRT-RTX {trt.__version__} lacks {missing}"


def test_the_levels_and_targets_that_options_name_exist() -> None:
    from scm_sdk.engines.targets import AHEAD_OF_TIME

    for version in ("10.13", "11.4"):
        levels = {name.lower() for name in NAMES[version]["HardwareCompatibilityLevel"]}
        assert {"none", "same_compute_capability", "ampere_plus"} <= levels
    trt: Any = pytest.importorskip("tensorrt_rtx")
    assert all(hasattr(trt.ComputeCapability, "SM" + c.replace(".", "")) for c in AHEAD_OF_TIME)


def test_cuda_has_every_name() -> None:
    cuda: Any = pytest.importorskip("cuda.bindings.runtime")
    source = (ROOT / "runtimes/tensorrt/device_memory.py").read_text(encoding="utf-8")
    names = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(".api") and node.attr.startswith("cuda")
    }
    assert len(names) > 15
    assert [name for name in names if not hasattr(cuda, name)] == []
    assert hasattr(cuda.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    assert hasattr(cuda.cudaMemcpyKind, "cudaMemcpyHostToDevice")
