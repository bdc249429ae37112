"""Write a Triton model repository from a bundle: the sampler as a graph and as engines, and a Python model in front.

    OUT/NAME_core/1/model.onnx          the sampler, by Triton's ONNX Runtime backend
    OUT/NAME_core_trt/1/model_sm89.plan the same as TensorRT engines, one for each compute capability
    OUT/NAME/1/model.py                 seed, label -> noise -> sampler -> 8-bit pictures (``triton_model``)
    OUT/MANIFEST.json OUT/README.md     digests and comparisons; how to run it

TensorRT-RTX engines are left out: Triton's TensorRT backend cannot load them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from scm_sdk import _version
from scm_sdk._util.files import sha256_file
from scm_sdk._util.publish import atomic_folder
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.errors import ConfigError, ScmError
from scm_sdk.inference.start import can_start, offset_factor
from scm_sdk.spec import SamplerSpec, TensorSpec

from . import triton_model
from .graph.io import data_path_of

MANIFEST = "MANIFEST.json"
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


@dataclass(frozen=True, kw_only=True)
class TritonRepository:
    """What was written.

    Attributes:
        path: The repository.
        models: Names of its models, the one for clients first.
        left_out: Paths of engines that Triton cannot load.
    """

    path: Path
    models: tuple[str, ...]
    left_out: tuple[str, ...]


def write_triton_repository(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    steps: int | None = None,
    precision: str = "fp32",
    name: str | None = None,
    max_queue_size: int = 64,
    timeout_seconds: float = 30.0,
    overwrite: bool = False,
) -> TritonRepository:
    """Write a model repository, whole or not at all.

    Args:
        path: The bundle.
        out: The folder.
        steps: Number of network calls; None is 2 where the bundle has it.
        precision: Of the graph and the engines.
        name: Of the model; None is the bundle's, with other characters than letters, digits, ``._-`` replaced.
        max_queue_size: Requests that may wait; further ones are refused.
        timeout_seconds: How long a request may wait.
        overwrite: Replace an earlier repository of this function.

    Raises:
        ConfigError: If the bundle has no such graph, or an option is out of its range.
        ScmError: If the folder exists or cannot be written.
    """
    bundle = Bundle.open(path)
    bundle.check_not_split("a Triton repository")
    known = [spec.num_inference_steps for spec in bundle.manifest.samplers]
    count = (2 if 2 in known else known[0]) if steps is None else steps
    spec = bundle.spec(count)
    chosen = [a for a in bundle.manifest.artifacts if a.num_inference_steps == count and a.precision == precision]
    graphs = [a for a in chosen if a.format == "onnx"]
    if not graphs:
        raise ConfigError(
            f"{bundle.path} has no {precision} graph of {count} steps, expected one for Triton's ONNX Runtime backend. "
            "Add it: scm-export onnx, scm-export precision, or choose another one: scm-export inspect"
        )
    if max_queue_size < 1 or not timeout_seconds > 0:
        raise ConfigError(
            f"max_queue_size is {max_queue_size}, timeout_seconds {timeout_seconds}, expected 1 or more, and above 0."
        )
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", bundle.manifest.name if name is None else name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", model):
        raise ConfigError(
            f"name is {model!r}, expected letters, digits and ._-, a letter or a digit first. Give another."
        )
    engines = [a for a in chosen if a.format == "tensorrt" and a.engine is not None]
    core = f"{model}_core_trt" if engines else f"{model}_core"
    queue = {"max_queue_size": max_queue_size, "default_timeout_microseconds": round(timeout_seconds * 1e6)}
    with atomic_folder(out, overwrite=overwrite, marker=MANIFEST, error=ScmError) as folder:
        _write(folder / f"{model}_core", _core_config(f"{model}_core", spec, {"backend": "onnxruntime"}))
        _copy_graph(bundle, graphs[0], folder / f"{model}_core" / "1" / "model.onnx")
        if engines:
            _write_engines(bundle, engines, folder / core, spec)
        _write(folder / model, _front_config(model, core, spec, queue))
        shutil.copyfile(triton_model.__file__, folder / model / "1" / "model.py")
        used = [graphs[0], *engines]
        (folder / "README.md").write_text(_readme(bundle, model, core, used), encoding="utf-8")
        _write_manifest(bundle, folder, used)
        names = sorted(each.name for each in folder.iterdir() if each.is_dir())
    left_out = tuple(a.path for a in chosen if a.format == "tensorrt_rtx")
    return TritonRepository(
        path=Path(out), models=(model, *(each for each in names if each != model)), left_out=left_out
    )


def _write(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(_text(config), encoding="utf-8")


def _copy_graph(bundle: Bundle, graph: Artifact, target: Path) -> None:
    """Copy a graph; with weights next to it Triton wants a folder of that name around both."""
    source = bundle.file(graph.path)
    data = data_path_of(source)
    if data.exists():
        target.mkdir()
        shutil.copyfile(data, target / data.name)
        target = target / source.name
    shutil.copyfile(source, target)


def _write_engines(bundle: Bundle, engines: Sequence[Artifact], folder: Path, spec: SamplerSpec) -> None:
    files: dict[str, str] = {}
    for engine in engines:
        assert engine.engine is not None
        for capability in engine.engine.compute_capabilities:
            files.setdefault(capability, f"model_sm{capability.replace('.', '')}.plan")
    first = next(iter(files.values()))
    config = _core_config(folder.name, spec, {"platform": "tensorrt_plan", "default_model_filename": first})
    config["cc_model_filenames"] = [{"key": capability, "value": file} for capability, file in files.items()]
    _write(folder, config)
    for engine in engines:
        assert engine.engine is not None
        for capability in engine.engine.compute_capabilities:
            shutil.copyfile(bundle.file(engine.path), folder / "1" / files[capability])


def _core_config(name: str, spec: SamplerSpec, kind: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the sampler: noise and conditioning in, samples out."""
    output = TensorSpec(name=spec.output_name, shape=spec.image_shape)
    warmup = {
        t.name: {"data_type": _Word(_TYPES[t.dtype]), "dims": list(t.shape) or [1], "zero_data": True}
        for t in spec.inputs
    }
    return {
        "name": name,
        **kind,
        "max_batch_size": spec.max_batch,
        "input": [_tensor(tensor) for tensor in spec.inputs],
        "output": [_tensor(output)],
        "dynamic_batching": {},
        "model_warmup": [
            {"name": "one", "batch_size": 1, "inputs": [{"key": key, "value": value} for key, value in warmup.items()]}
        ],
    }


def _front_config(name: str, core: str, spec: SamplerSpec, queue: Mapping[str, int]) -> dict[str, Any]:
    """Return the config of the Python model."""
    picture = spec.output == "pixels" and len(spec.image_shape) == 3 and spec.image_shape[0] in (1, 3)
    inputs: list[dict[str, Any]] = [{"name": "seed", "data_type": _Word("TYPE_UINT64"), "dims": [1]}]
    for tensor in spec.conditioning_inputs:
        one = {"name": tensor.name, "data_type": _Word(_TYPES[tensor.dtype]), "dims": list(tensor.shape) or [1]}
        inputs.append(one | ({"optional": True} if not tensor.shape else {}))
    channels, height, width = spec.image_shape if picture else (0, 0, 0)
    starts = picture and can_start(spec, has_encoder=False)
    if starts:
        dims = [height, width, channels]
        inputs.append({"name": "image", "data_type": _Word("TYPE_UINT8"), "dims": dims, "optional": True})
    pictures = [
        {"name": "images", "data_type": _Word("TYPE_UINT8"), "dims": [height, width, channels]},
        {"name": "png", "data_type": _Word("TYPE_STRING"), "dims": [1]},
    ]
    samples = [{"name": "samples", "data_type": _Word("TYPE_FP32"), "dims": list(spec.image_shape)}]
    sampler = {
        "noise_inputs": [tensor.name for tensor in spec.noise_inputs],
        "sample_shape": spec.sample_shape,
        "num_classes": spec.num_classes,
        "guidance_range": spec.guidance_range,
        "default_guidance": spec.default_guidance,
        "output": spec.output_name,
        "value_range": spec.value_range if picture else None,
        "offset_factor": float(offset_factor(spec)) if starts else None,
    }
    parameters = {"core": core, "sampler": json.dumps(sampler)}
    policy = {"timeout_action": _Word("REJECT"), "allow_timeout_override": True, **queue}
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": spec.max_batch,
        "input": inputs,
        "output": pictures if picture else samples,
        "dynamic_batching": {"default_queue_policy": policy},
        "instance_group": [{"kind": _Word("KIND_CPU"), "count": 1}],
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
    }


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    found = {"name": tensor.name, "data_type": _Word(_TYPES[tensor.dtype]), "dims": list(tensor.shape) or [1]}
    return found if tensor.shape else found | {"reshape": {"shape": []}}  # one number for each sample


class _Word(str):
    """A name of an enumeration, which has no quotes."""


def _text(value: Mapping[str, Any], indent: str = "") -> str:
    """Return a message in protobuf's text format."""
    lines = []
    for key, each in value.items():
        many = each if isinstance(each, list) and each and isinstance(each[0], dict) else [each]
        for one in many:
            if isinstance(one, dict):
                lines.append(f"{indent}{key} {{\n{_text(one, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(one)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, _Word):
        return value
    # JSON's strings, numbers, truth values and lists are protobuf's, too.
    return json.dumps(value)


def _write_manifest(bundle: Bundle, folder: Path, used: Sequence[Artifact]) -> None:
    paths = {artifact.path for artifact in used}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "bundle": bundle.manifest.name,
        "build_id": bundle.manifest.build_id,
        "scm_sdk": _version.__version__,
        "versions": dict(bundle.manifest.versions),
        "artifacts": [msgspec.to_builtins(artifact) for artifact in used],
        "parity": [msgspec.to_builtins(record) for record in bundle.manifest.parity if record.artifact in paths],
        "sha256": {path.relative_to(folder).as_posix(): sha256_file(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _readme(bundle: Bundle, model: str, core: str, used: Sequence[Artifact]) -> str:
    versions = sorted({a.engine.library_version for a in used if a.engine is not None})
    engines = (
        f"\nThe engines were built with TensorRT {', '.join(versions)} and load in a Triton release with the same "
        "version, on the compute capabilities that their names say. An engine is executable code: trust its origin. To "
        f"use the graph instead, set the parameter `core` of `{model}/config.pbtxt` to `{model}_core`.\n"
        if versions
        else ""
    )
    return f"""# {model}: a Triton model repository

Made by scm-export {_version.__version__} of build `{bundle.manifest.build_id}`.
`{MANIFEST}` has the sha256 of every file and the recorded comparisons with PyTorch.

```sh
docker run --rm --gpus all --read-only --tmpfs /tmp --shm-size 256m -p 127.0.0.1:8000:8000 -v "$PWD":/models:ro \\
  nvcr.io/nvidia/tritonserver:YY.MM-py3 tritonserver --model-repository=/models --model-control-mode=none \\
  --disable-auto-complete-config --strict-readiness=true --allow-grpc=false --allow-metrics=false
```

`{model}` takes `seed` (UINT64 [N, 1]) and, if the model has them, `class_labels` (INT64 [N, 1]) and `guidance_scale`
(FP32 [N, 1]), and `image` (UINT8 [N, H, W, C]) where a sampler of pixels starts from images. It returns `images`
(UINT8 [N, H, W, C]) and, if it is asked for, `png`. Without labels each seed draws its own. It calls `{core}`, which
takes noise.
{engines}
- Triton has no keys and no TLS: publish its port on this machine alone, or behind a proxy. The Python backend runs the
  code of this folder: mount it read-only.
- Probe with an inference, not with `/v2/health/ready`: a Python model whose process died stays "ready" and fails every
  request until it is loaded again.
- The same seed gives the same noise as in scm-sdk. Engines may round differently in batches of different sizes.
"""
