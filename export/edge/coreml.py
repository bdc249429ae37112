"""Core ML: the sampler as an ``.mlpackage`` for iPhones and Macs, with what checks it on a Mac.

A package is converted on any system and runs on Apple's systems only. The recorded samples are stored next to it,
with a checker in Python (coremltools) and one in Swift; until one of them ran, the artifact is unverified. Labels are
int32 in it.
"""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from scm_sdk._util.lazy import installed_version
from scm_sdk.errors import ExportError

from .converters import quiet
from .recorded import write_recorded
from .runtimes import EdgeSource

CHECKERS = ("check.py", "check.swift")


def export(source: EdgeSource, path: Path) -> tuple[str, ...]:
    """Convert the checkpoint with coremltools; store checkers and samples next to the package. See ``Exporter``."""
    import coremltools
    import torch

    module, feeds = source.sampler()
    precision = coremltools.precision.FLOAT16 if source.precision == "fp16" else coremltools.precision.FLOAT32
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, (), feeds).run_decompositions({})
            model = coremltools.convert(
                program,
                convert_to="mlprogram",
                compute_precision=precision,
                minimum_deployment_target=coremltools.target.iOS17,
                skip_model_load=True,
            )
            described = model.get_spec()
            (output,) = described.description.output
            coremltools.utils.rename_feature(described, output.name, source.spec.output_name)
            coremltools.models.MLModel(described, weights_dir=model.weights_dir, skip_model_load=True).save(str(path))
    except Exception as exc:  # its own and torch's share no base class
        raise ExportError(
            f"coremltools {installed_version('coremltools')} cannot convert this sampler: {str(exc).strip()[:500]}. "
            "Expected operators that it knows; run the ONNX graph with another runtime."
        ) from exc
    write_recorded(source.bundle, source.spec, source.precision, path.parent)
    with as_file(files("scm_sdk.export.edge") / "coreml_files") as folder:
        for name in CHECKERS:
            shutil.copyfile(folder / name, path.parent / name)
    labels = ["labels: int32 in this package"] if any(t.dtype == "int64" for t in source.spec.inputs) else []
    return ("unverified until check.py or check.swift next to it ran on a Mac", *labels)
