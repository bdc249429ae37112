"""Trace a torch network to an ONNX model; the only module that calls torch's exporter.

``torch.export`` traces the network, then ``torch.onnx`` translates the trace. Calling them separately, not through
``torch.onnx.export``, gives a single way of tracing, no silent retries, and distinguishable errors.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scm_sdk._util.lazy import install_command, outdated
from scm_sdk.errors import BackendUnavailable, ExportError, ScmError, ShapeError

from .partial_eval import BATCH_DIM

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import Node

OPSET = 20
"""Read by TensorRT 10, TensorRT-RTX and ONNX Runtime 1.18 and later; opset 23 brings an Attention
operator that engines cannot build in float32."""
ROOT = "network"
"""Attribute of the traced module that holds the network; the prefix of all exported names."""
EXAMPLE_BATCH = 2
"""Batch size of the example: torch treats the sizes 0 and 1 as constants."""

_CHATTY = (
    "torch.onnx._internal.exporter._registration",  # "torchvision is not installed. Skipping ..."
    "torch.fx.experimental.symbolic_shapes",  # repeats the exception
)
_STACK_LINE = re.compile(r'File "([^"]+)", line (\d+)')


def require_exportable(network: nn.Module) -> None:
    """Check mode and dtypes of a network before slow work.

    Raises:
        ExportError: If a module is in training mode or a weight is not float32.
    """
    import torch

    for name, module in network.named_modules():
        if module.training:
            raise ExportError(
                f"module {name or type(module).__name__!r} is in training mode, expected evaluation mode: "
                "dropout would be exported as noise. Call model.eval() before exporting."
            )
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ExportError(
                f"weight {name!r} is {tensor.dtype}, expected torch.float32. Call model.float() first; "
                "smaller precisions are made from the float32 graph."
            )


def trace_network(
    network: nn.Module, x: Tensor, conditioning: Mapping[str, Tensor], *, flow_map: bool = False
) -> ExportedProgram:
    """Trace ``network(x, t, **conditioning)`` for one time and any batch size.

    The traced module takes ``t``, and ``r`` of a flow map, as (1,) and expands them to the batch, as
    the network protocol requires, so that one time applies to the whole batch.

    Args:
        network: A float32 network in evaluation mode.
        x: Example samples, ``(B, *sample_shape)`` with B = ``EXAMPLE_BATCH``.
        conditioning: Example conditioning by argument name, axis 0 is the batch.
        flow_map: Whether the network also takes ``r``, which becomes the third input.

    Raises:
        ShapeError: If the output of the network differs in shape or dtype from ``x``.
        ExportError: If the network fails, fixes the batch size, or has control flow that depends on a tensor.
    """
    import torch

    class AtOneTime(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, times: dict[str, Tensor], conditioning: dict[str, Tensor]) -> Tensor:
            t, *target = (time.expand(x.shape[0]) for time in times.values())
            given = {**({"r": target[0]} if target else {}), **conditioning}
            out: Tensor = self.network(x, t, **given)
            return out

    module = AtOneTime().eval()
    times = {name: torch.full((1,), at, device=x.device) for name, at in (("t", 1.0), ("r", 0.5))[: 1 + flow_map]}
    args = (x, times, dict(conditioning))
    with torch.no_grad(), _translated(f"{type(network).__name__} fails on an example of two samples"):
        out = _example(module, args)
    if not isinstance(out, torch.Tensor) or out.shape != x.shape or out.dtype != x.dtype:
        is_tensor = isinstance(out, torch.Tensor)
        found = f"{tuple(out.shape)} {out.dtype}" if is_tensor else type(out).__name__
        raise ShapeError(
            f"{type(network).__name__} returned {found} for x of {tuple(x.shape)} {x.dtype}, expected F to "
            "be like x. A network that also returns a weighting must leave it out of forward()."
        )
    batch = {0: torch.export.Dim(BATCH_DIM)}
    shapes = {"x": batch, "times": dict.fromkeys(times), "conditioning": {name: batch for name in conditioning}}
    with torch.no_grad(), _quiet(), _translated(f"{type(network).__name__} cannot be traced"):
        return torch.export.export(module, args, dynamic_shapes=shapes, strict=False)


def trace_decoder(decoder: nn.Module, latents: Tensor) -> ExportedProgram:
    """Trace ``decoder(latents)`` for any batch size.

    Args:
        decoder: A float32 decoder in evaluation mode.
        latents: Example, ``(B, *sample_shape)`` with B = ``EXAMPLE_BATCH``.

    Raises:
        ShapeError: If the output shape differs from the config.
        ExportError: If it fails, fixes the batch size, or has control flow that depends on a tensor.
    """
    import torch

    class Decoding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, latents: Tensor) -> Tensor:
            out: Tensor = self.decoder(latents)
            return out

    module, name = Decoding().eval(), type(getattr(decoder, "module", decoder)).__name__
    with torch.no_grad(), _translated(f"{name} fails on an example of two samples"):
        _example(module, (latents,))
    with torch.no_grad(), _quiet(), _translated(f"{name} cannot be traced"):
        shapes = {"latents": {0: torch.export.Dim(BATCH_DIM)}}
        return torch.export.export(module, (latents,), dynamic_shapes=shapes, strict=False)


def trace_frame(decoder: nn.Module, latents: Tensor, caches: tuple[Tensor, ...]) -> ExportedProgram:
    """Trace ``decoder(latents, caches)``, a tuple of tensors, for any batch size.

    Args:
        decoder: A float32 decoder in evaluation mode; see ``scm_sdk.model.decoder.FrameDecoder``.
        latents: Example of one frame with B = ``EXAMPLE_BATCH``; its numbers are not read.
        caches: Examples of the caches.

    Raises:
        ExportError: If it fails, fixes the batch size, or has control flow that depends on a tensor.
    """
    import torch

    class Decoding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, latents: Tensor, caches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            out: tuple[Tensor, ...] = self.decoder(latents, caches)
            return out

    batch = {0: torch.export.Dim(BATCH_DIM)}
    shapes = {"latents": batch, "caches": (batch,) * len(caches)}
    with torch.no_grad(), _quiet(), _translated(f"{type(decoder).__name__} cannot be traced"):
        return torch.export.export(Decoding().eval(), (latents, caches), dynamic_shapes=shapes, strict=False)


def trace_tokens(encoder: nn.Module, length: int) -> ExportedProgram:
    """Trace ``encoder(input_ids, attention_mask)`` for any batch size.

    Args:
        encoder: A float32 text encoder in evaluation mode.
        length: Tokens of each text.

    Raises:
        ExportError: If it fails, fixes the batch size, or has control flow that depends on a tensor.
    """
    import torch

    ids = torch.zeros((EXAMPLE_BATCH, length), dtype=torch.int64)
    shapes = {name: {0: torch.export.Dim(BATCH_DIM)} for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), _quiet(), _translated("the text encoder cannot be traced"):
        return torch.export.export(encoder, (ids, torch.ones_like(ids)), dynamic_shapes=shapes, strict=False)


def translate(program: ExportedProgram, inputs: Sequence[str], *outputs: str) -> ir.Model:
    """Translate a trace to ONNX.

    Args:
        program: Result of ``trace_network`` or ``trace_decoder``.
        inputs: Names of its inputs in order.
        *outputs: Names of its outputs in order.

    Returns:
        A model of opset 20. It shares memory with the weights of the network and holds the exporter's metadata.

    Raises:
        ExportError: If an operator has no translation, or the result has another opset.
        BackendUnavailable: If a library is too old; old ones give wrong graphs or fail later.
    """
    import torch

    if old := outdated("torch", "onnx", "onnx_ir", "onnxscript"):
        raise BackendUnavailable(
            f"exporting a network needs other versions: found {'; '.join(map(' '.join, old.items()))}. Install them "
            f"with: {install_command('export', '--upgrade')}"
        )
    with _quiet(), _translated("a traced network cannot be translated"):
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            external_data=False,
            verbose=False,
        )
    assert exported is not None, "torch.onnx.export returns a program when dynamo=True"
    model = exported.model
    if (opset := model.opset_imports.get("")) != OPSET:
        raise ExportError(
            f"torch {torch.__version__} exported opset {opset}, expected {OPSET}: the network holds an "
            "operator that cannot be converted. Update torch and onnxscript."
        )
    return model


def _example(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Run a module on example inputs for the shape and dtype of its output.

    On the meta device if possible, because real execution of a large network or decoder takes gigabytes and minutes;
    otherwise for real, which also finds errors.
    """
    import torch
    from torch.utils import _pytree as pytree

    def to_meta(tree: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), tree)

    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    try:
        return torch.func.functional_call(module, to_meta(tensors), to_meta(args))
    except Exception:  # any error: the real run decides
        return module(*args)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of torch's exporter that users cannot act on."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    said = io.StringIO()
    with warnings.catch_warnings():
        # torch.export uses its own deprecated tree types (torch 2.9 to 2.13).
        warnings.filterwarnings("ignore", r".*treespec, LeafSpec.* is deprecated", FutureWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            # On failure torch prints the whole graph; the exception has the relevant part.
            with redirect_stderr(said):
                yield
            sys.stderr.write(said.getvalue())
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _translated(subject: str) -> Iterator[None]:
    """Convert exceptions of torch to an ExportError that names the operator and the line of the user."""
    try:
        yield
    except ScmError:
        raise
    except Exception as exc:  # torch and the network may raise any exception
        node = _failed_node(exc)
        if node is None:
            found = _first_line(exc)
        elif "DispatchError" in _kinds(exc):
            found = f"operator {node.target} has no translation to ONNX opset {OPSET}"
        else:
            *_, first = _chain(exc)
            found = f"operator {node.target} cannot be translated ({_first_line(first)})"
        raise ExportError(f"{subject}{_user_line(exc, node)}: {found}. {_remedy(exc, node)}") from exc


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().split("\n")[0] or type(exc).__name__


def _failed_node(exc: BaseException) -> Node | None:
    """Return the operator that torch was translating: the innermost node in a frame."""
    from torch.fx import Node

    found = None
    for error in _chain(exc):
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in frame.f_locals.values():
                if isinstance(value, Node) and value.op == "call_function":
                    found = value
    return found


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes, down to the first."""
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _kinds(exc: BaseException) -> set[str]:
    """Return the class names of an exception and its causes."""
    return {type(error).__name__ for error in _chain(exc)}


def _remedy(exc: Exception, node: Node | None) -> str:
    kinds = _kinds(exc)
    if node is not None:
        return "Expected operators that ONNX has; write that line with others."
    if "GuardOnDataDependentSymNode" in kinds:
        return (
            "Expected a network that runs the same operators whatever its inputs hold; it decides by the "
            "value of a tensor. Choose between results with torch.where, not with if, and avoid .item()."
        )
    if "ConstraintViolationError" in kinds:
        return "Expected a network for any batch size; take the batch from x.shape[0], never a fixed number."
    return "Expected network(x, t, class_labels) to return F; run it manually on such inputs to see more."


def _user_line(exc: Exception, node: Node | None) -> str:
    """Return `` at file:line`` of the innermost line outside of torch and this module, or nothing."""
    import torch

    if node is not None:
        places = [(path, int(line)) for path, line in _STACK_LINE.findall(node.meta.get("stack_trace") or "")]
    else:
        places = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(exc.__traceback__)]
    library = str(Path(torch.__file__).parent)
    user = [p for p in places if not p[0].startswith((library, __file__, "<")) and Path(p[0]).is_file()]
    return f" at {user[-1][0]}:{user[-1][1]}" if user else ""
