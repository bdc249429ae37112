"""Read the networks of an EDM- or EDM2-style ``.pkl``: class name, arguments and tensors.

Such a file is a dict (``ema``, ``encoder``, ``loss_fn``, ``dataset_kwargs``) of objects with the source code of their
class, which Python's unpickler would execute. Here the source is skipped.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError, ConfigError, IntegrityError
from .allowed import Allowed, Budget, Buildable
from .machine import read_pickle
from .tensors import (
    StoredArray,
    StoredDtype,
    StoredTensor,
    array_of_buffer,
    read_scalar,
    rebuild_parameter,
    rebuild_tensor,
    storage_reader,
)

MAX_FILE_BYTES = 16 << 30
"""Maximum file size, bytes. The largest known file, EDM2's XXL in float32, has 6 GB."""
MAX_NAMES = 500_000
"""Maximum number of modules, tensors and attributes; EDM's largest networks have 30 thousand."""
MAX_DEPTH = 32
_MAX_FACTS = 10_000


@dataclass(frozen=True, kw_only=True)
class PickledNetwork:
    """One network of a file.

    Attributes:
        entry: Key in the file, for example ``ema``.
        class_name: Name of the class.
        arguments: Constructor arguments as JSON values; others are dropped.
        tensors: Parameters and persistent buffers, by the names of its ``state_dict()``.
        facts: Other content of the file as JSON values: options of the data set, numbers of the encoder.
    """

    entry: str
    class_name: str
    arguments: dict[str, Any]
    tensors: dict[str, StoredTensor]
    facts: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class _Object(Buildable):
    """Placeholder of a module or another object: the name of its class, and its attributes."""

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        self.state: dict[str, Any] | None = None

    def build(self, state: Any) -> None:
        if type(state) is not dict or self.state is not None:
            raise ValueError("an object whose state is no dict, or that has two")
        self.state = state


def read_network(path: str | os.PathLike[str], *, entry: str = "ema") -> PickledNetwork:
    """Read the weights of a network without executing anything.

    Args:
        path: The file.
        entry: Name of the network in the file.

    Raises:
        BundleError: If the file does not exist, is too large, or names an unknown global.
        IntegrityError: If it is truncated or not such a pickle.
        ConfigError: If it has no network of this name.
    """
    path = Path(path)
    data = _map(path)
    budget = Budget()
    root, end = read_pickle(data, _table(str(path), budget), where=str(path), budget=budget)
    if end != len(data):
        raise IntegrityError(
            f"{path} continues for {len(data) - end} bytes after its end, expected none. Copy it again."
        )
    if type(root) is not dict:
        root = {entry: root}
    network = root.get(entry)
    if not isinstance(network, _Object) or "_modules" not in (network.state or {}):
        there = [key for key, value in root.items() if isinstance(value, _Object) and "_modules" in (value.state or {})]
        raise ConfigError(
            f"{path} holds no network {entry!r}, expected one of: {', '.join(sorted(there)[:8]) or 'none is there'}. "
            "Name it, or take another file."
        )
    tensors = dict(_walk(network, str(path)))
    if not tensors:
        raise ConfigError(f"{path} holds a network {entry!r} without a tensor, expected weights. Take another file.")
    found = PickledNetwork(
        entry=entry,
        class_name=network.class_name,
        arguments=_Facts().mapping((network.state or {}).get("_init_kwargs")),
        tensors=tensors,
        facts=_Facts().mapping({key: value for key, value in root.items() if key != entry}),
    )
    # Many tensors may share stored bytes; a genuine file uses each about once.
    if found.nbytes > 2 * len(data):
        raise BundleError(
            f"{path} would unfold to {found.nbytes} bytes of tensors, its own size is {len(data)}, expected no more "
            "than twice that. It is refused."
        )
    return found


def _map(path: Path) -> memoryview:
    try:
        if not path.is_file():  # a pipe would block
            raise BundleError(f"{path} is no file, expected a network's pickle. Check the path.")
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise BundleError(f"{path} has {size} bytes, expected at most {MAX_FILE_BYTES}. It is refused.")
            if size == 0:
                raise IntegrityError(f"{path} is empty, expected a network's pickle. Copy it again.")
            head = stream.read(4)
            if head == b"PK\x03\x04":
                raise BundleError(
                    f"{path} is a zip file, as torch.save writes it, expected an EDM-style pickle. Load it with "
                    "torch.load(weights_only=True) and save its tensors as safetensors."
                )
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as exc:
        raise BundleError(f"{path} cannot be read: {getattr(exc, 'strerror', None) or exc}. Check the path.") from exc


def _table(where: str, budget: Budget) -> Mapping[str, Allowed]:
    """All allowed globals, with both module names of numpy, which changed in version 2."""
    table = {
        "torch_utils.persistence._reconstruct_persistent_obj": Allowed(call=_persistent_object),
        "dnnlib.util.EasyDict": Allowed(call=dict_of_pairs, new=dict),
        "collections.OrderedDict": Allowed(call=dict_of_pairs, new=dict),
        "torch._utils._rebuild_parameter": Allowed(call=rebuild_parameter),
        "torch._utils._rebuild_tensor_v2": Allowed(call=rebuild_tensor),
        "torch.storage._load_from_bytes": Allowed(call=storage_reader(where, budget)),
        "torch.nn.modules.container.ModuleDict": Allowed(new=lambda: _Object("ModuleDict")),
        "numpy.ndarray": Allowed(),
        "numpy.dtype": Allowed(call=StoredDtype),
        "_codecs.encode": Allowed(call=bytes_of_text),
    }
    for module in ("builtins", "__builtin__"):  # protocols 2 and 3 use globals where later ones have instructions
        table[f"{module}.set"] = Allowed(call=set_of_text)
        table[f"{module}.bytes"] = Allowed(call=no_bytes)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[f"{module}._reconstruct"] = Allowed(call=StoredArray)
        table[f"{module}.scalar"] = Allowed(call=read_scalar)
    for module in ("numpy.core.numeric", "numpy._core.numeric"):
        table[f"{module}._frombuffer"] = Allowed(call=array_of_buffer)
    return table


def set_of_text(*arguments: Any) -> set[str]:
    """Placeholder of ``set([...])``."""
    if len(arguments) != 1 or type(arguments[0]) is not list or not all(type(item) is str for item in arguments[0]):
        raise ValueError("a set made from something else than a list of text")
    return set(arguments[0])


def bytes_of_text(*arguments: Any) -> memoryview:
    """Placeholder of ``codecs.encode(text, "latin1")``, the bytes of protocol 2."""
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != "latin1":
        raise ValueError("bytes made from something else than text in latin1")
    return memoryview(arguments[0].encode("latin1"))


def no_bytes(*arguments: Any) -> memoryview:
    """Placeholder of ``bytes()``."""
    if arguments:
        raise ValueError("bytes made by a call with arguments")
    return memoryview(b"")


def dict_of_pairs(*arguments: Any) -> dict[str, Any]:
    """Placeholder of ``OrderedDict()`` and ``EasyDict()``; their items follow as separate instructions."""
    if arguments:
        raise ValueError("a dict made from something else than its items")
    return {}


def _persistent_object(meta: Any) -> _Object:
    """Keep class name and state; drop the source code, ``module_src``."""
    if type(meta) is not dict or meta.get("type") != "class" or type(meta.get("class_name")) is not str:
        raise ValueError("an object of an unknown form")
    if not meta["class_name"].isidentifier() or len(meta["class_name"]) > 200:
        raise ValueError("an object whose class has no name")
    found = _Object(meta["class_name"])
    found.build(meta.get("state") if meta.get("state") is not None else {})
    return found


def _walk(network: _Object, where: str) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the content of ``state_dict()`` of the module, in its order."""
    seen, waiting = 0, [("", network, 0)]
    while waiting:
        prefix, module, depth = waiting.pop()
        state = module.state or {}
        parameters, buffers, modules = (state.get(name) for name in ("_parameters", "_buffers", "_modules"))
        if type(parameters) is not dict or type(buffers) is not dict or type(modules) is not dict:
            raise IntegrityError(f"{where}: module {prefix or '(root)'} holds no parameters. Copy the file again.")
        # A module may be referenced many times, so the work is counted in advance.
        seen += 1 + len(state) + len(parameters) + len(buffers) + len(modules)
        if seen > MAX_NAMES or depth > MAX_DEPTH:
            raise BundleError(
                f"{where} has more than {MAX_NAMES} names or nests deeper than {MAX_DEPTH} modules, more than any "
                "network. It is refused."
            )
        passing = state.get("_non_persistent_buffers_set") or ()
        for name, value in {**parameters, **{n: b for n, b in buffers.items() if n not in passing}}.items():
            if value is None:
                continue
            _check_name(name, prefix, where)
            if not isinstance(value, StoredTensor):
                raise IntegrityError(f"{where}: {prefix}{name} is no tensor. Copy the file again.")
            yield prefix + name, value
        if lost := sorted(name for name, value in state.items() if isinstance(value, StoredTensor)):
            raise ConfigError(
                f"{where}: module {prefix or '(root)'} keeps a tensor {lost[0]!r} that is neither parameter nor "
                "buffer, so its weights are not whole without its code. Save them as safetensors where it was made."
            )
        for name, child in reversed(modules.items()):
            if child is None:
                continue
            _check_name(name, prefix, where)
            if not isinstance(child, _Object):
                raise IntegrityError(f"{where}: {prefix}{name} is no module. Copy the file again.")
            waiting.append((f"{prefix}{name}.", child, depth + 1))


def _check_name(name: str, prefix: str, where: str) -> None:
    if not name or len(prefix + name) > 1000 or "." in name or not name.isprintable():
        raise IntegrityError(f"{where}: a tensor or module of {prefix or '(root)'} has no proper name. Copy it again.")


class _Facts:
    """Converts the other content of the file to JSON values, with limits on size and depth."""

    def __init__(self) -> None:
        self.left = _MAX_FACTS

    def mapping(self, value: Any) -> dict[str, Any]:
        return self._plain(value, 0) if type(value) is dict else {}  # type: ignore[return-value]

    def _plain(self, value: Any, depth: int) -> object:
        self.left -= 1
        if self.left < 0 or depth > 8:
            return None
        if value is None or type(value) in (bool, str) or (type(value) is float and math.isfinite(value)):
            return value if type(value) is not str else value[:1000]
        if type(value) is int:
            return value if abs(value) < 2**63 else None
        if type(value) in (tuple, list):
            return [self._plain(item, depth + 1) for item in value]  # pyright: ignore[reportGeneralTypeIssues]
        if type(value) is dict:
            return {key[:200]: self._plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, _Object):
            own = {k: v for k, v in (value.state or {}).items() if not k.startswith("_")}
            return {"class_name": value.class_name, **{k[:200]: self._plain(v, depth + 1) for k, v in own.items()}}
        if isinstance(value, StoredArray) and value.array is not None and value.array.size <= 64:
            return value.array.tolist()
        return None
