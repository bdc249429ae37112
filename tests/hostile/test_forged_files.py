"""Forged manifests, tensor files, pickles, configs and training runs are refused by name or do what they say.

Each class is a list of named forgeries, with every hash recomputed.
"""

from __future__ import annotations

import json
import os
import pickletools
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostile.campaign import SEED, Limits, Silent, run_campaign
from hostile.forging import (
    ESCAPES,
    VALUES,
    forged_json,
    leaves,
    nested,
    read_json,
    require_printable,
    reseal,
    run_cli,
    write_base,
)

pytestmark = pytest.mark.hostile
HERE = "hostile.test_forged_files"


# The manifest.


def test_manifests(material: Path, tmp_path: Path, record: Any) -> None:
    write_base(tmp_path / "base")
    manifest = read_json(tmp_path / "base/scm_manifest.json")
    cases = [[list(path), kind] for path in leaves(manifest) for kind in VALUES]
    record(run_campaign("forged manifests", f"{HERE}:prepare_manifests", cases, setup={"base": str(tmp_path / "base")}))


def prepare_manifests(setup: dict[str, Any], scratch: Path) -> Callable[[list[Any]], None]:
    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.inference.generator import Generator

    base, folder = Path(setup["base"]), scratch / "bundle"
    shutil.copytree(base, folder)
    manifest = read_json(base / "scm_manifest.json")
    card = (base / "README.md").read_bytes()

    def attempt(case: list[Any]) -> None:
        path, kind = case
        reseal(folder, forged_json(manifest, tuple(path), kind) if path else json.dumps(manifest))
        try:
            Bundle.open(folder)
            if kind == "twice" and not isinstance(path[-1], int):
                raise Silent("a key that is there twice is accepted")
            with Generator.from_pretrained(folder, backend="onnxruntime") as gen:
                require_printable(f"{gen.plan()} {gen!r}")
                gen(1, seed=0, class_labels=0)
            run_cli("inspect", str(folder))
            run_cli("bundle", "verify", str(folder))
            run_cli("bundle", "card", str(folder))
            text = (folder / "README.md").read_text("utf-8")
            require_printable(text)
            if "<script>" in text:
                raise Silent("markup reaches the card")
        finally:
            (folder / "README.md").write_bytes(card)

    attempt([[], "as it is"])
    manifest["name"] = "resealed"
    attempt([[], "as it is"])
    return attempt


# Tensor files.


def test_tensor_files(material: Path, record: Any) -> None:
    cases = [[where, name] for where in ("weights", "goldens") for name in tensor_forgeries(b"", {}, "x")]
    setup = {"model": str(material / "model"), "bundle": str(material / "plain")}
    record(run_campaign("forged tensor files", f"{HERE}:prepare_tensors", cases, setup=setup))


def tensor_forgeries(body: bytes, header: dict[str, Any], name: str) -> dict[str, Callable[[], bytes]]:
    """Return the forgeries of a tensor file whose tensor ``name`` is changed."""

    def build(new: Any, data: bytes = body, length: int | None = None) -> bytes:
        text = new if isinstance(new, bytes) else json.dumps(new).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def with_tensor(**changes: Any) -> Callable[[], bytes]:
        return lambda: build({**header, name: header[name] | changes})

    def shape_of(n: int) -> list[int]:
        return [n]

    dtypes = ("F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "", "X", None, 5)
    found: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "short": lambda: b"\x08\0\0",
        "length 0": lambda: build(header, length=0),
        "length huge": lambda: build(header, length=2**63 - 1),
        "length max": lambda: build(header, length=2**64 - 1),
        "length beyond": lambda: build(header, length=len(body) * 2 + 10**6),
        "no JSON": lambda: build(b"\xff" * 100),
        "list": lambda: build([]),
        "deep": lambda: build(nested(200_000).encode()),
        "deep metadata": lambda: build(b'{"__metadata__":' + nested(50_000).encode() + b"}"),
        "metadata number": lambda: build({**header, "__metadata__": {"a": 1}}),
        "metadata escapes": lambda: build({**header, "__metadata__": {ESCAPES: ESCAPES}}),
        "no tensors": lambda: build({}, b""),
        "tensor missing": lambda: build({k: v for k, v in header.items() if k != name}),
        "tensor escapes": lambda: build({(ESCAPES if k == name else k): v for k, v in header.items()}),
        "tensor twice": lambda: build(
            json.dumps({**header, "@@": header[name]}).replace('"@@"', json.dumps(name)).encode()
        ),
        "many tensors": lambda: build(
            {**header, **{f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}}
        ),
        "header of 110 MB": lambda: build(json.dumps(header).encode() + b" " * (110 << 20)),
        "offsets negative": with_tensor(data_offsets=[-4, 0]),
        "offsets backwards": with_tensor(data_offsets=[8, 4]),
        "offsets beyond": with_tensor(data_offsets=[0, 2**62]),
        "offsets text": with_tensor(data_offsets="all"),
        "offsets absent": with_tensor(data_offsets=None),
        "overlap": lambda: build({**header, "again": header[name]}),
        "gap": lambda: build(header, body + bytes(64)),
        "shape huge": with_tensor(shape=[2**62, 2**62]),
        "shape wraps": with_tensor(shape=[2**32, 2**32, 1]),
        "shape negative": with_tensor(shape=[-1]),
        "shape text": with_tensor(shape="3"),
        "shape flat": lambda: build({**header, name: header[name] | {"shape": shape_of(_items(header[name]))}}),
        "shape long": lambda: build({**header, name: header[name] | {"shape": [*header[name]["shape"], *[1] * 5000]}}),
        "nan": lambda: build(header, np.full(len(body) // 4, np.nan, np.float32).tobytes()),
        "infinity": lambda: build(header, np.full(len(body) // 4, np.inf, np.float32).tobytes()),
        "huge numbers": lambda: build(header, np.full(len(body) // 4, 3e38, np.float32).tobytes()),
        "all ones": lambda: build(header, b"\xff" * len(body)),
        "cut": lambda: build(header, body[: len(body) // 2]),
    }
    for dtype in dtypes:
        found[f"dtype {dtype}"] = with_tensor(dtype=dtype)
    for dtype, size in {"F16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}.items():
        found[f"all {dtype}"] = lambda dtype=dtype, size=size: _retyped(build, header, body, dtype, size)
    return found


def _items(entry: dict[str, Any]) -> int:
    return int(np.prod(entry["shape"]))


def _retyped(build: Callable[..., bytes], header: dict[str, Any], body: bytes, dtype: str, size: int) -> bytes:
    """Return a valid file of the same names and shapes in another dtype."""
    new, at = {}, 0
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        end = at + _items(entry) * size
        new[key] = entry | {"dtype": dtype, "data_offsets": [at, end]}
        at = end
    return build(new, (body * (at // max(1, len(body)) + 1))[:at])


def prepare_tensors(setup: dict[str, Any], scratch: Path) -> Callable[[list[Any]], None]:
    import torch

    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.inference.generator import Generator

    torch.set_num_threads(1)
    shutil.copytree(setup["model"], scratch / "model")
    shutil.copytree(setup["bundle"], scratch / "bundle")
    weights = "diffusion_pytorch_model.safetensors"
    files = {"weights": scratch / "model" / weights, "goldens": scratch / "bundle/golden/golden.safetensors"}
    whole = {where: path.read_bytes() for where, path in files.items()}
    manifest = (scratch / "bundle/scm_manifest.json").read_bytes()
    with Generator.from_pretrained(scratch / "model", backend="torch") as gen:
        right = gen(1, seed=1, class_labels=0, output_type="np").images
    harmless = {"metadata escapes"}

    def attempt(case: list[Any]) -> None:
        where, name = case
        data = whole[where]
        size = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        tensor = next(key for key in header if key != "__metadata__")
        try:
            files[where].write_bytes(tensor_forgeries(body, header, tensor)[name]())
            if where == "weights":
                with Generator.from_pretrained(scratch / "model", backend="torch") as gen:
                    images = gen(1, seed=1, class_labels=0, output_type="np").images
                if not np.isfinite(images).all():
                    raise Silent("pictures that are none")
                if name in harmless and not np.array_equal(images, right):
                    raise Silent("other pictures")
            else:
                reseal(scratch / "bundle")
                Bundle.open(scratch / "bundle").goldens()
        finally:
            files[where].write_bytes(whole[where])
            (scratch / "bundle/scm_manifest.json").write_bytes(manifest)

    return attempt


# Pickles.

_GLOBALS = (
    "os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "builtins __import__",
    "builtins open", "subprocess Popen", "nt system", "sys exit", "importlib import_module", "pickle loads",
    "torch load", "torch.hub load", "numpy load", "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict",
    "torch.nn.modules.container ModuleDict", "torch_utils.persistence _reconstruct_persistent_obj",
    "dnnlib.util EasyDict",
    "functools partial", "operator attrgetter", "webbrowser open", "socket socket", "ctypes CDLL", "code interact",
    "builtins type", "builtins set", "builtins bytearray", "_codecs encode", "copyreg _reconstructor",
)  # fmt: skip
_STACKS = {
    "nothing": b"", "none": b"N", "two": b"NN", "mark": b"(", "marked": b"(NN", "dict": b"}",
    "dict item": b"}X\1\0\0\0aN",
    "list": b"]", "list item": b"]N", "tuple": b")", "marked list": b"](NN", "marked dict": b"}(X\1\0\0\0aN",
    "global": b"ccollections\nOrderedDict\n", "call": b"ccollections\nOrderedDict\n)",
    "text": b"X\2\0\0\0osX\6\0\0\0system",
    "ints": b"K\1K\2", "object": b"ctorch.nn.modules.container\nModuleDict\n)\x81",
    "object state": b"ctorch.nn.modules.container\nModuleDict\n)\x81}",
}  # fmt: skip


def pickle_cases() -> list[Any]:
    """Return the names of all forged pickles."""
    names: list[Any] = [
        ["opcode", op.name, stack, arg] for op in pickletools.opcodes for stack in _STACKS for arg in range(4)
    ]
    names += [["global", each, how] for each in _GLOBALS for how in range(8)]
    names += [["mutated", n] for n in range(3000)]
    return names


def test_pickles(material: Path, record: Any) -> None:
    setup = {"pickle": str(material / "network.pkl"), "seed": SEED}
    record(run_campaign("forged pickles", f"{HERE}:prepare_pickles", pickle_cases(), setup=setup))


def _argument(op: Any, choice: int) -> bytes:
    """Return an opcode's argument: small, nothing, as large as it can be, or junk."""
    if op.arg is None:
        return b""
    name = op.arg.name
    text = (b"os\n", b"\n", b"a" * 100_000 + b"\n", b"\xff\xfe'\"\\x\n")[choice]
    if name == "stringnl_noescape_pair":
        return text + (b"system\n", b"\n", b"b" * 100_000 + b"\n", b"\xff\n")[choice]
    if "nl" in name:
        return (
            (b"1\n", b"\n", b"9" * 10_000 + b"\n", b"'unclosed\n")[choice]
            if "decimal" in name or "float" in name
            else text
        )
    sizes = {"1": 1, "2": 2, "4": 4, "8": 8}
    fixed = {"uint1": 1, "uint2": 2, "int4": 4, "uint4": 4, "uint8": 8, "float8": 8}
    if name in fixed:
        return (b"\1" + bytes(fixed[name] - 1), bytes(fixed[name]), b"\xff" * fixed[name], b"\x7f" * fixed[name])[
            choice
        ]
    width = next((size for key, size in sizes.items() if name.endswith(key)), 4)
    length = (3, 0, 2 ** (8 * width - 1) - 1, 200)[choice]
    return length.to_bytes(width, "little") + (b"abc", b"", b"abc", b"abc")[choice]


def prepare_pickles(setup: dict[str, Any], scratch: Path) -> Callable[[list[Any]], None]:
    from scm_sdk.pickles.convert import convert_pickle
    from scm_sdk.pickles.network import read_network

    whole = Path(setup["pickle"]).read_bytes()
    path, out = scratch / "network.pkl", scratch / "out"
    path.write_bytes(whole)
    read_network(path)
    convert_pickle(path, out)
    shutil.rmtree(out)
    acted: list[str] = []
    watched = (
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "ctypes.dlopen",
    )

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in watched or (event == "import" and arguments[0] in ("webbrowser", "dnnlib", "torch_utils", "code")):
            acted.append(f"{event} {arguments[0]}")

    sys.addaudithook(watch)

    def make(case: list[Any]) -> bytes:
        if case[0] == "opcode":
            op = next(each for each in pickletools.opcodes if each.name == case[1])
            return b"\x80\x04" + _STACKS[case[2]] + op.code.encode("latin-1") + _argument(op, case[3]) + b"."
        if case[0] == "global":
            module, name = case[1].encode().split()
            short = bytes([len(module)]) + module, bytes([len(name)]) + name
            by = [b"c" + module + b"\n" + name + b"\n", b"\x8c" + short[0] + b"\x8c" + short[1] + b"\x93"][case[2] % 2]
            call = [b")R", b")\x81", b"X\1\0\0\0a\x85R", b"}b"][case[2] // 2]
            return b"\x80\x04" + by + call + b"."
        rng = random.Random(f"{setup['seed']}/pickle/{case[1]}")
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at, kind = rng.randrange(len(data)), rng.randrange(4)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at] = rng.choice([ord(op.code) for op in pickletools.opcodes])
            elif kind == 2:
                del data[at : at + rng.choice((1, 4, 64))]
            else:
                to = rng.randrange(len(data))
                data[at:at] = data[to : to + rng.choice((1, 8, 64))]
        return bytes(data)

    def attempt(case: list[Any]) -> None:
        path.write_bytes(make(case))
        acted.clear()
        try:
            for tensor in read_network(path).tensors.values():
                tensor.numpy()
            convert_pickle(path, out)
        finally:
            shutil.rmtree(out, ignore_errors=True)
            if acted:
                raise Silent(f"it did {acted[:3]}")

    return attempt


# Configurations of checkpoints.


def test_configs(material: Path, record: Any) -> None:
    config = read_json(material / "model/config.json")
    cases: list[Any] = [[list(path), kind] for path in leaves(config) for kind in VALUES]
    cases += [[["network", key], value] for key in config["network"] for value in (2, 7, 1000, 10**6, 2**20, 2**62)]
    setup = {"model": str(material / "model")}
    record(run_campaign("forged configs", f"{HERE}:prepare_configs", cases, setup=setup))


def prepare_configs(setup: dict[str, Any], scratch: Path) -> Callable[[list[Any]], None]:
    import torch

    from scm_sdk.inference.generator import Generator

    torch.set_num_threads(1)
    folder = scratch / "model"
    shutil.copytree(setup["model"], folder)
    config = read_json(folder / "config.json")
    with Generator.from_pretrained(folder, backend="torch") as gen:
        gen(1, seed=1, class_labels=0)

    def attempt(case: list[Any]) -> None:
        path, kind = case
        if isinstance(kind, int):
            changed = json.loads(json.dumps(config))
            changed["network"][path[1]] = kind
            text = json.dumps(changed)
        else:
            text = forged_json(config, tuple(path), kind)
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with Generator.from_pretrained(folder, backend="torch") as gen:
            require_printable(f"{gen.plan()} {gen!r}")
            images = gen(1, seed=1, class_labels=0, output_type="np").images
        if not np.isfinite(images).all():
            raise Silent("pictures that are none")

    return attempt


# The state of a training run.

_TRAIN_KINDS = ("null", "minus one", "2^70", "escapes", "list", "infinity", "deep", "absent", "twice", "long")
_LOG_LINES = {
    "empty line": b"\n", "NUL": b"\0" * 100 + b"\n", "half": b'{"iteration": 2, "lo', "text": b"text\n",
    "list": b"[]\n",
    "no keys": b"{}\n", "deep": nested(100_000).encode() + b"\n", "not UTF-8": b"\xff\xfe\n",
    "huge": b"9" * 10**6 + b"\n",
    "future": b'{"iteration": 99, "loss": 1.0}\n', "negative": b'{"iteration": -1, "loss": 1.0}\n',
    "NaN": b'{"iteration": 2, "loss": NaN}\n', "text iteration": b'{"iteration": "2"}\n', "10 MB": b" " * 10_000_000,
}  # fmt: skip


def test_training_runs(material: Path, record: Any) -> None:
    settings = read_json(material / "half-run/train.json")
    cases: list[Any] = [
        ["train.json", list(path), kind]
        for n, path in enumerate(leaves(settings))
        for kind in (_TRAIN_KINDS[(n + shift) % len(_TRAIN_KINDS)] for shift in (0, 3, 6))
    ]
    cases += [["log.jsonl", name, where] for name in _LOG_LINES for where in ("before", "after", "instead")]
    cases += [["state", name] for name in tensor_forgeries(b"", {}, "x")]
    cases += [["state bytes", n] for n in range(150)]
    cases += [["config.json", kind] for kind in ("empty", "junk", "deep")]
    cases += [["replaced", name, how] for name in ("state.safetensors", "train.json", "log.jsonl", "config.json",
    ".lock")
              for how in ("folder", "fifo", "link", "empty", "device")]  # fmt: skip
    setup = {"run": str(material / "half-run"), "folder": str(material), "seed": SEED}
    limits = Limits(cpu_seconds=40, memory_bytes=4 << 30)
    record(run_campaign("forged training runs", f"{HERE}:prepare_runs", cases, setup=setup, limits=limits))


def prepare_runs(setup: dict[str, Any], scratch: Path) -> Callable[[list[Any]], None]:
    import torch

    from hostile.conftest import TRAIN
    from scm_sdk._util.files import sha256_file

    torch.set_num_threads(1)
    source, run = Path(setup["run"]), scratch / "run"
    shutil.copyfile(Path(setup["folder"]) / "data.npz", scratch / "data.npz")
    weights = run / "diffusion_pytorch_model.safetensors"

    def resume() -> str:
        run_cli("train", "-o", "run", *TRAIN)
        return sha256_file(weights)

    shutil.copytree(source, run)
    before = sha256_file(run / "state.safetensors")
    right = resume()
    assert sha256_file(run / "state.safetensors") != before, "the run was not over"
    shutil.rmtree(run)

    def change(case: list[Any]) -> None:
        kind = case[0]
        path = run / {"state": "state.safetensors", "state bytes": "state.safetensors"}.get(kind, kind)  # pyright: ignore[reportOperatorIssue]
        if kind == "train.json":
            path.write_bytes(forged_json(read_json(path), tuple(case[1]), case[2]).encode("utf-8", "surrogatepass"))
        elif kind == "log.jsonl":
            old, line = path.read_bytes() if path.exists() else b"", _LOG_LINES[case[1]]
            path.write_bytes({"before": line + old, "after": old + line, "instead": line}[case[2]])
        elif kind == "state":
            data = path.read_bytes()
            size = struct.unpack("<Q", data[:8])[0]
            header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
            tensor = next(key for key in header if key != "__metadata__")
            path.write_bytes(tensor_forgeries(body, header, tensor)[case[1]]())
        elif kind == "state bytes":
            from hostile.test_random_damage import damage

            path.write_bytes(damage(path.read_bytes(), random.Random(f"{setup['seed']}/state/{case[1]}"))[0])
        elif kind == "config.json":
            path.write_text({"empty": "", "junk": "junk", "deep": nested(100_000)}[case[1]], encoding="utf-8")
        else:
            _replace(run / case[1], case[2])

    def attempt(case: list[Any]) -> None:
        shutil.copytree(source, run)
        try:
            change(case)
            if resume() != right:
                raise Silent("it continues to other weights")
        finally:
            shutil.rmtree(run)

    return attempt


def _replace(path: Path, how: str) -> None:
    path.unlink(missing_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "link":
        path.symlink_to("nothing")
    else:
        path.touch()
