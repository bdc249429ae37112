"""Check a graph and write it to disk atomically."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scm_sdk._util.files import fsync_file, fsync_folder, real_path, sha256_file, staging
from scm_sdk._util.lazy import require
from scm_sdk.bundle.graph_checks import check_graph_file
from scm_sdk.bundle.manifest import ImageSize, describe_size
from scm_sdk.errors import BundleError, ConfigError, ExportError, UnsupportedGraphError

if TYPE_CHECKING:
    import onnx_ir as ir

EXTERNAL_DATA_ABOVE = 100 * 2**20
"""Default of ``external_data_above``, bytes. Protobuf is limited to 2 GiB, but a graph with its weights
inside is copied several times while it is parsed; external weights are memory-mapped.
100 MiB is also the largest file of common Git hosts."""
GRAPH_NAME = "model.onnx"
"""Name of a sampler graph in its folder in a bundle, at the first image size."""
_LARGEST_GRAPH = 2**31 - 2**26
"""Protobuf's limit of 2 GiB, minus space for the nodes."""
_INLINE_BYTES = 1024
"""Tensors up to this size always stay in the graph."""


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """Report of a written graph.

    Attributes:
        path: The graph.
        bytes: Size of the graph file.
        sha256: Digest of the graph file.
        data_path: The file of external weights, or None if they are in the graph.
        data_bytes: Size of this file; 0 if there is none.
        data_sha256: Digest of this file; empty if there is none.
        opset: ONNX opset.
        num_nodes: Nodes of the graph.
        num_initializers: Stored tensors.
        num_parameters: Elements of all stored tensors.
        seconds: Wall time of each stage.
    """

    path: Path
    bytes: int
    sha256: str
    data_path: Path | None
    data_bytes: int
    data_sha256: str
    opset: int
    num_nodes: int
    num_initializers: int
    num_parameters: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    def moved(self, path: Path) -> GraphReport:
        """Return the report with the final path of the files."""
        return replace(self, path=path, data_path=None if self.data_path is None else data_path_of(path))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def sized_name(size: ImageSize) -> str:
    """Return the name of a sampler graph at a further image size: ``model-768x1344.onnx``."""
    return f"model-{describe_size(size)}.onnx"


def data_path_of(path: Path) -> Path:
    """Return the path of the external weights of the graph at ``path``: ``<path>_data``."""
    return path.with_name(path.name + "_data")


def save_apart(model: ir.Model, path: Path) -> None:
    """Write a graph with its weights in ``data_path_of(path)``, unchecked.

    int64 tensors stay in the graph, because shapes, axes and Split sizes are read before the data file.
    """
    import onnx_ir as ir

    tensors = (value.const_value for value in model.graph.initializers.values())
    whole = (t.nbytes for t in tensors if t is not None and t.dtype == ir.DataType.INT64)
    inline = max([_INLINE_BYTES, *whole])
    ir.save(model, path, external_data=data_path_of(path).name, size_threshold_bytes=inline)


def read_model(path: Path) -> ir.Model:
    """Read a graph; its weights stay on disk until they are used.

    Args:
        path: A graph that ``write_model`` wrote, or any other ONNX file; external weights must be in its folder.

    Raises:
        BackendUnavailable: If onnx_ir is not installed.
        ExportError: If the file is missing or not an ONNX graph.
    """
    require("onnx_ir", extra="export", purpose="reading ONNX graphs")
    import onnx_ir as ir

    try:
        return ir.load(path)
    except OSError as exc:
        raise ExportError(f"{path} cannot be read: {exc.strerror or exc}. Expected an ONNX graph.") from exc
    except Exception as exc:  # errors of protobuf and onnx_ir have no common base class
        raise ExportError(
            f"{path} is no ONNX graph: {exc}. Expected what scm-export onnx writes; export it again."
        ) from exc


def write_model(model: ir.Model, path: Path, *, external_data_above: int = EXTERNAL_DATA_ABOVE) -> GraphReport:
    """Check a model and write it, with its weights in ``<path>_data`` if they are large.

    Both files are written and checked under temporary names before they replace old ones, and the old data file is
    restored if the second rename fails. Only a power loss between the two renames can leave a new data file with an old
    graph; their sha256 show it.

    Args:
        model: The model; it is not changed. The same model gives the same bytes.
        path: The file, for example ``model.onnx``; missing folders are created.
        external_data_above: Total size of weights, bytes, above which they are external.

    Raises:
        ConfigError: If ``external_data_above`` exceeds the limit of a graph file.
        UnsupportedGraphError: If ``onnx.checker`` or the checks of opening refuse the model.
        ExportError: If the files cannot be written. No files remain.
    """
    if external_data_above > _LARGEST_GRAPH:
        raise ConfigError(
            f"external_data_above is {external_data_above}, expected at most {_LARGEST_GRAPH}: a graph file "
            "cannot hold more, larger weights need a file of their own."
        )
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    external = sum(tensor.nbytes for tensor in weights) > external_data_above
    target = real_path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging(target.parent) as folder:
            staged = folder / target.name
            _save(model, staged, external=external)
            _check(staged)
            report = _report(model, staged).moved(path)
            _publish(folder, target)
    except OSError as exc:
        raise ExportError(
            f"{path} cannot be written: {exc.strerror or exc}. Expected a folder that may be written to, "
            "with room for the weights. Nothing was changed; choose another place or free some space."
        ) from exc
    return report


def write_beside(model: ir.Model, path: Path, first: Path) -> GraphReport:
    """Write a graph into the folder of another one; stored tensors that are equal to the byte are not stored again.

    Large tensors that the other graph does not have go into the graph, or into ``<path>_data`` if they are many bytes.

    Args:
        model: The model; it is not changed.
        path: The file, in the folder of ``first``, where an earlier one is replaced. Not atomic: for a folder that is
            published as a whole.
        first: A graph that ``write_model`` wrote. If its weights are in the graph, those of the model are, too.

    Raises:
        UnsupportedGraphError: As ``write_model``.
        ExportError: If the files cannot be written. No files remain.
    """
    import onnx_ir as ir

    shared = _stored_beside(first)
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]
    before = [value.const_value for value in values]
    own = []
    try:
        for value, tensor in zip(values, before, strict=True):
            assert tensor is not None, "chosen so"
            same = shared.get(_content(tensor)) if tensor.nbytes > _INLINE_BYTES else None
            if same is not None:
                value.const_value = ir.ExternalTensor(
                    same.location, same.offset, same.length, same.dtype, shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "", base_dir=first.parent,
                )  # fmt: skip
            elif tensor.nbytes > _INLINE_BYTES and tensor.dtype != ir.DataType.INT64:
                own.append((value, tensor))
            else:
                value.const_value = _in_memory(tensor)
        if sum(tensor.nbytes for _, tensor in own) > EXTERNAL_DATA_ABOVE:
            made: Sequence[ir.TensorProtocol] = ir.external_data.convert_tensors_to_external(
                [tensor for _, tensor in own], path.parent, data_path_of(path).name
            )
        else:
            made = [_in_memory(tensor) for _, tensor in own]
        for (value, _), each in zip(own, made, strict=True):
            value.const_value = each
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        fsync_file(path)
        _check(path, data_path_of(first))
        return _report(model, path)
    except BaseException as exc:
        path.unlink(missing_ok=True)
        data_path_of(path).unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise ExportError(
                f"{path} cannot be written: {exc.strerror or exc}. Expected a folder that may be written to, with room "
                "for it. Free some space."
            ) from exc
        raise
    finally:
        for value, tensor in zip(values, before, strict=True):
            value.const_value = tensor


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return a tensor that does not refer to the file of another graph."""
    import onnx_ir as ir

    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name)


def _stored_beside(graph: Path) -> dict[tuple[str, bytes], ir.ExternalTensor]:
    """Return the tensors of a graph that are in the file next to it, by their content."""
    import onnx_ir as ir

    tensors = (value.const_value for value in read_model(graph).graph.initializers.values())
    return {_content(tensor): tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _content(tensor: ir.TensorProtocol) -> tuple[str, bytes]:
    """Return dtype and digest of the bytes; the same bytes may have any shape."""
    return tensor.dtype.name, hashlib.sha256(tensor.tobytes()).digest()


def read_report(path: Path) -> GraphReport:
    """Return the report of a graph that ``write_model`` wrote, without ``seconds``.

    Raises:
        ExportError: If the file is missing or not an ONNX graph.
    """
    return _report(read_model(path), path)


def _report(model: ir.Model, path: Path) -> GraphReport:
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    data = data_path_of(path)
    external = data.is_file()
    return GraphReport(
        path=path,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        data_path=data if external else None,
        data_bytes=data.stat().st_size if external else 0,
        data_sha256=sha256_file(data) if external else "",
        opset=model.opset_imports[""],
        num_nodes=model.graph.num_nodes(),
        num_initializers=len(weights),
        num_parameters=sum(tensor.size for tensor in weights),
    )


def _save(model: ir.Model, path: Path, *, external: bool) -> None:
    import onnx_ir as ir

    if external:
        save_apart(model, path)
    else:
        # Weights read from the file of another graph still refer to it; they are stored in the new graph.
        ir.external_data.load_to_model(model)
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _check(path: Path, *shared: Path) -> None:
    """Run onnx.checker with shape inference and the checks of opening on a file and its weights.

    ``shared`` are further files that the weights are in.
    """
    import onnx

    files = (data_path_of(path), *shared)
    try:
        check_graph_file(path, {data.name: data.stat().st_size for data in files if data.is_file()})
    except BundleError as exc:
        raise UnsupportedGraphError(str(exc)) from exc

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise UnsupportedGraphError(
            f"onnx.checker refused the graph: {str(exc).strip()}. Expected a valid model; this is a bug of "
            "the exporter or of scm-sdk, please report it."
        ) from exc


def _publish(folder: Path, path: Path) -> None:
    """Move the staged graph and its data file, if any, to ``path``; restore the old data on failure."""
    data_path, new_data, old_data = data_path_of(path), data_path_of(folder / path.name), folder / "old"
    for file in (folder / path.name, new_data):
        if file.exists():
            fsync_file(file)
    if data_path.exists():
        os.replace(data_path, old_data)
    try:
        if new_data.exists():
            os.replace(new_data, data_path)
        os.replace(folder / path.name, path)
    except BaseException:  # also KeyboardInterrupt
        data_path.unlink(missing_ok=True)
        if old_data.exists():
            os.replace(old_data, data_path)
        raise
    fsync_folder(path.parent)
