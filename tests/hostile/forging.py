"""Forge JSON and bundles, with every hash recomputed."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hostile.campaign import Silent, commands

ESCAPES = "\x1b[2J\x07\u202e<script>alert(1)</script>"
"""Text that would clear a terminal, ring, reverse what follows and run in a browser."""


def run_cli(*arguments: str) -> str:
    """Run ``scm-export`` in this process; a clean refusal raises ``ScmError``, a traceback its exception."""
    from click.testing import CliRunner

    from scm_sdk.errors import ScmError
    from scm_sdk.export.cli import main

    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise ScmError(result.output.strip())
    require_printable(result.output)
    return result.output


def require_printable(text: str) -> None:
    """Refuse text that controls a terminal."""
    if odd := commands(text):
        raise Silent(f"{odd[:5]} reach the terminal: {text[:200]!r}")


def write_base(folder: Path) -> None:
    """Write a bundle with every part of a manifest: a ten-line graph, goldens, a card, an engine, records."""
    from helpers.toy_bundles import write_linear_graph
    from scm_sdk.bundle.bundle import write_bundle
    from scm_sdk.bundle.goldens import Golden, write_goldens
    from scm_sdk.bundle.manifest import Artifact, EngineFacts, ParityRecord
    from scm_sdk.inference.generator import Generator
    from scm_sdk.spec import SamplerSpec

    spec = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4), num_classes=2, class_names=("a", "b"))
    graph, engine = "onnx/fp32/1step/model.onnx", "engines/rtx/model.engine"
    facts = EngineFacts(
        library_version="1.7.1.116", compute_capabilities=("8.9",), platform="linux-x86_64", batch=(1, 8, 32)
    )
    parts: dict[str, Any] = {
        "name": "forged",
        "samplers": [spec],
        "artifacts": [Artifact(path=graph, format="onnx", num_inference_steps=1)],
        "provenance": {"license": "CC0-1.0", "iteration": "3", "data": "nothing"},
        "versions": {"onnx": "1.20"},
    }
    write_linear_graph(folder / graph, spec)
    write_bundle(folder, **parts)
    seeds, labels = np.arange(3), np.array([0, 1, 0])
    with Generator.from_pretrained(folder, backend="onnxruntime") as gen:
        images = gen(3, seed=0, class_labels=list(labels), output_type="raw").images
    (folder / "scm_manifest.json").unlink()
    write_goldens(folder, {1: Golden(images=images, seeds=seeds, class_labels=labels)})
    (folder / engine).parent.mkdir(parents=True)
    (folder / engine).write_bytes(b"engine" * 100)
    parts["artifacts"].append(
        Artifact(path=engine, format="tensorrt_rtx", num_inference_steps=1, precision="fp16", engine=facts)
    )
    record = ParityRecord(
        artifact=graph, reference="denoiser", backend="onnxruntime", threshold=1e-5, noise_floor=1e-6, max_abs=1e-7,
        psnr_db=120.0, num_samples=4, passed=True, batches=(1, 3),
    )  # fmt: skip
    parts["built_from"] = {engine: [graph]}
    write_bundle(folder, parity=[record], budgets=[], **parts)
    run_cli("bundle", "card", str(folder))


def read_json(path: Path) -> Any:
    """Return the value of a JSON file."""
    return json.loads(path.read_bytes())


def reseal(folder: Path, text: str | None = None) -> None:
    """Write the hashes of the files as they are now to the manifest.

    Args:
        folder: The bundle.
        text: The manifest's text if it was forged, too. Its build id is recomputed where it can be read at all.
    """
    import msgspec

    from scm_sdk._util.files import sha256_file
    from scm_sdk.bundle.manifest import Manifest
    from scm_sdk.bundle.verify import seal

    path = folder / "scm_manifest.json"
    if text is None:
        manifest = read_json(path)
        for entry in manifest["files"]:
            there = folder / entry["path"]
            if there.is_file():
                entry |= {"size": there.stat().st_size, "sha256": sha256_file(there)}
        text = json.dumps(manifest)
    try:
        read = msgspec.json.decode(text.encode(), type=Manifest)
        whole = seal(read)
    except Exception:  # a manifest that no reader accepts keeps the digests that it has
        pass
    else:
        text = text.replace(read.build_id, whole.build_id) if read.build_id else text
        for name, digest in read.digests.items():
            text = text.replace(f'"{name}": "{digest}"', f'"{name}": "{whole.digests.get(name, digest)}"')
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


VALUES: dict[str, Any] = {
    "null": None, "true": True, "zero": 0, "minus one": -1, "half": 0.5, "2^31": 2**31, "2^70": 2**70,
    "empty": "", "text": "text", "escapes": ESCAPES, "path": "../../etc/passwd", "NUL": "a\0b",
    "long": "a" * 1_000_000, "list": [], "many": [0] * 100_000, "dict": {}, "infinity": "RAW:1e999", "nan": "RAW:NaN",
    "digits": "RAW:" + "9" * 5000, "surrogate": 'RAW:"\\ud800"', "deep": "RAW:" + nested(100_000), "absent": "ABSENT",
    "twice": "TWICE",
}  # fmt: skip
"""What any JSON value is replaced by. ``absent`` leaves the key out, ``twice`` gives it null before its own value."""


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a JSON value, containers included; of a list its first two items."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, child in children:
        yield from leaves(child, (*path, key))


def forged_json(value: Any, path: tuple[Any, ...], kind: str) -> str:
    """Return the text of a JSON value with the one at ``path`` replaced."""
    value = json.loads(json.dumps(value))
    parent = functools.reduce(lambda at, key: at[key], path[:-1], value)
    key, new = path[-1], VALUES[kind]
    if new == "ABSENT":
        del parent[key]
        return json.dumps(value)
    if new == "TWICE":
        if isinstance(parent, list):
            parent.append(parent[key])
            return json.dumps(value)
        items = list(parent.items())
        parent.clear()
        parent |= dict(item for each in items for item in ([("\0", None), each] if each[0] == key else [each]))
        return json.dumps(value).replace(json.dumps("\0"), json.dumps(key))
    raw = isinstance(new, str) and new.startswith("RAW:")
    parent[key] = "@@RAW@@" if raw else new
    text = json.dumps(value)
    return text.replace('"@@RAW@@"', new[4:]) if raw else text
