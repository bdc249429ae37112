"""A command that is killed at any moment leaves what was there, and its rerun ends as if nothing had happened.

Each command is killed at file-system events that were counted in an undisturbed run, and at random times, while two
writers and two readers work at the same time.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.killing import Child, command, fork
from hostile.campaign import SEED, Left, Limits, Silent, run_campaign

pytestmark = pytest.mark.hostile
COUNT = int(os.environ.get("SCM_HOSTILE_KILLS", "220"))
"""Kills of all commands together, of some of which only each second one is tried."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command that is killed.

    Attributes:
        arguments: Of ``scm-export``, run in a folder with copies of ``start``.
        start: What of the material is there, by its new name.
        target: What the command changes.
        writers: Two commands that run at the same time, again and again.
        readers: What two readers do with ``target``: ``bundle``, ``archive``, ``run`` or ``file``.
        same: Files of the target that are the same after every run, as a pattern.
        opened: Archives that are opened before, so that the cache holds them.
        every: Which of its kills are tried: each, or each second one of a command that takes long.
    """

    arguments: Sequence[str]
    start: dict[str, str]
    target: str = "out"
    writers: tuple[Sequence[str], Sequence[str]] = (
        ("bundle", "card", "out"),
        ("validate", "out", "--precision", "fp32", "--steps", "1", "--num-seeds", "2", "--batch", "1"),
    )
    readers: str = "bundle"
    same: str = r"denoiser/|onnx/fp32/|golden/|scheduler/"
    opened: tuple[str, ...] = ()
    every: int = 1


_RUN = r"config\.json|diffusion_.*\.safetensors|train\.json|samples/"
_TRAIN = ("--data", "data.npz", "--label", "kind", "--rows", "0", "128", "--preset", "tiny")
_LENGTH = ("--iterations", "3", "--checkpoint-every", "2", "--sample-every", "2", "--batch-size", "4")
_BUNDLE, _PLAIN, _MODEL = {"out": "bundle"}, {"out": "plain"}, {"model": "model"}
_ASIDE = tuple(("bundle", "unpack", "plain.scmz", "-o", f"aside{n}", "--overwrite") for n in (0, 1))


def _twice(*arguments: str) -> tuple[Sequence[str], Sequence[str]]:
    return arguments, arguments


VERBS: dict[str, Verb] = {
    "onnx": Verb(
        arguments=("onnx", "model", "-o", "out"),
        start={**_MODEL, "aside0": "plain", "aside1": "plain", "plain.scmz": "plain.scmz"},
        every=2,
        writers=_ASIDE,  # type: ignore[arg-type]
    ),
    "precision": Verb(
        arguments=("precision", "out"), start=_PLAIN, same=r"denoiser/|onnx/fp(32|16)/|golden/|precision/"
    ),
    "quantize": Verb(
        arguments=("quantize", "out", "--num-samples", "4"), start=_PLAIN, same=r"denoiser/|onnx/|golden/|calibration/"
    ),
    "engine": Verb(arguments=("engine", "out", "--target", "l4", "--precision", "fp32", "--steps", "1"), start=_PLAIN),
    "validate": Verb(arguments=("validate", "out", "--num-seeds", "2", "--batch", "1", "--steps", "2"), start=_BUNDLE),
    "evaluate": Verb(
        arguments=(
            "evaluate",
            "out",
            "--num-images",
            "64",
            "--backend",
            "onnxruntime",
            "--precision",
            "fp32",
            "--steps",
            "1",
            "--keep",
        ),
        start={**_PLAIN, "data.npz": "data.npz"},
    ),
    "bench": Verb(
        arguments=(
            "bench",
            "out",
            "--backend",
            "onnxruntime:fp32",
            "--batch",
            "1",
            "--rounds",
            "10",
            "--budget",
            "median=10000ms@b1",
            "--keep-budget",
        ),
        start=_PLAIN,
    ),
    "bundle card": Verb(arguments=("bundle", "card", "out", "--hub-id", "a/b"), start=_PLAIN),
    "bundle pack": Verb(
        arguments=("bundle", "pack", "plain", "-o", "out.scmz"),
        start={"plain": "plain", "out.scmz": "plain.scmz"},
        target="out.scmz",
        writers=_twice("bundle", "pack", "plain", "-o", "out.scmz"),
        readers="archive",
        same="",
    ),
    "bundle unpack": Verb(
        arguments=("bundle", "unpack", "plain.scmz", "-o", "out", "--overwrite"),
        start={**_PLAIN, "plain.scmz": "plain.scmz"},
        writers=_twice("bundle", "unpack", "plain.scmz", "-o", "out", "--overwrite"),
    ),
    "all": Verb(
        arguments=("all", "model", "-o", "out", "--precision", "fp16", "--no-validate"),
        start={**_MODEL, **_PLAIN},
        same=r"denoiser/|onnx/fp(32|16)/|golden/|precision/",
    ),
    "all, new": Verb(
        arguments=("all", "model", "-o", "out", "--precision", "fp16", "--no-validate"),
        start={**_MODEL, "aside0": "plain", "aside1": "plain", "plain.scmz": "plain.scmz"},
        every=2,
        writers=_ASIDE,  # type: ignore[arg-type]
        same=r"denoiser/|onnx/fp(32|16)/|golden/|precision/",
    ),
    "train": Verb(
        arguments=("train", "-o", "out", *_TRAIN, *_LENGTH),
        start={"data.npz": "data.npz"},
        writers=_twice("train", "-o", "out", *_TRAIN, *_LENGTH),
        readers="run",
        same=_RUN,
    ),
    "distill": Verb(
        arguments=("distill", "-o", "out", "--teacher", "teacher", *_LENGTH),
        start={"data.npz": "data.npz", "teacher": "teacher"},
        writers=_twice("distill", "-o", "out", "--teacher", "teacher", *_LENGTH),
        readers="run",
        same=_RUN,
    ),
    "import": Verb(
        arguments=("import", "network.pkl", "-o", "out"),
        start={"network.pkl": "network.pkl"},
        writers=_twice("import", "network.pkl", "-o", "out"),
        readers="file",
        same=r".*\.(safetensors|json)",
    ),
    "cache gc": Verb(
        arguments=("cache", "gc", "--max-size", "0"),
        start={"out.scmz": "plain.scmz", "bundle.scmz": "bundle.scmz"},
        target="out.scmz",
        opened=("out.scmz", "bundle.scmz"),
        writers=_twice("cache", "gc", "--max-size", "0"),
        readers="archive",
        same="",
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_kill_leaves_what_was_there(verb: str, material: Path, record: Any) -> None:
    numbers = range(list(VERBS).index(verb), COUNT, len(VERBS))[:: VERBS[verb].every]
    cases = [[number, "event" if place % 2 else "time"] for place, number in enumerate(numbers)]
    setup = {"material": str(material), "verb": verb, "seed": SEED}
    limits = Limits(cpu_seconds=600, wall_seconds=1200, memory_bytes=16 << 30, open_files=1024)
    record(run_campaign(f"kills, {verb}", "hostile.test_kills:prepare", cases, setup=setup, limits=limits, workers=1))


def prepare(setup: dict[str, Any], scratch: Path) -> Callable[[list[Any]], None]:
    import torch

    verb, place = VERBS[setup["verb"]], scratch / "work"
    _import_everything()
    torch.set_num_threads(1)
    place.mkdir()
    os.chdir(place)

    def clear() -> None:
        for path in place.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in ("cache", "tmp"):  # a killed process's temporary files are the system's to remove
            shutil.rmtree(scratch / name, ignore_errors=True)
        (scratch / "tmp").mkdir()

    def lay_out() -> None:
        clear()
        for name, source in verb.start.items():
            path = Path(setup["material"]) / source
            shutil.copytree(path, place / name) if path.is_dir() else shutil.copyfile(path, place / name)
        (place / ".reports").mkdir()
        for name in verb.opened:
            opening = fork(partial(_read_bundle, place / name), output=place / ".reports/opening")
            opening.events()
            assert opening.wait() == 0, (place / ".reports/opening").read_text("utf-8")

    def run(die_at: int = 0) -> Child:
        return fork(command([*verb.arguments]), die_at=die_at, output=place / ".reports/victim")

    lay_out()
    started = time.monotonic()
    undisturbed = run()
    events = undisturbed.events()
    seconds = time.monotonic() - started
    if undisturbed.wait():
        raise RuntimeError((place / ".reports/victim").read_text("utf-8"))
    right = _content(place / verb.target, verb.same)
    names = _names(place, scratch)
    reading = {"bundle": _read_bundle, "archive": _read_bundle, "run": _read_run, "file": _read_files}[verb.readers]
    pictures = reading(place / verb.target)

    def attempt(case: list[Any]) -> None:
        try:
            kill(*case)
        finally:
            clear()

    def kill(number: int, how: str) -> None:
        rng = random.Random(f"{setup['seed']}/{setup['verb']}/{number}")
        lay_out()
        subjects = [f"aside{n}" if f"aside{n}" in verb.start else verb.target for n in (0, 1)]
        beside = [
            *(fork(partial(_write_on, arguments), output=place / f".reports/writer{n}")
              for n, arguments in enumerate(verb.writers)),
            *(fork(partial(_read_on, reading, place / subject, pictures), output=place / f".reports/reader{n}")
              for n, subject in enumerate(subjects)),
        ]  # fmt: skip
        time.sleep(rng.uniform(0, 0.3))
        victim = run(die_at=rng.randint(1, events) if how == "event" else 0)
        if how == "time":
            deadline = time.monotonic() + rng.uniform(0, 1.5 * seconds)
            while time.monotonic() < deadline and not victim.ended():
                time.sleep(0.005)
            victim.kill()
        victim.events()
        (place / ".reports/stop").touch()
        for child in beside:
            child.events()
        _raise_reported(place / ".reports", [child.wait() for child in beside])
        if (
            os.path.lexists(place / verb.target)
            and verb.target in verb.start
            and reading(place / verb.target) != pictures
        ):
            raise Silent("the kill changed what the target gives")
        again = run()
        again.events()
        if again.wait():
            raise RuntimeError(f"the rerun ends with {again.wait()}: {_end(place / '.reports/victim')}")
        if (found := _content(place / verb.target, verb.same)) != right:
            odd = sorted(name for name in found.keys() | right.keys() if found.get(name) != right.get(name))
            raise Silent(f"the rerun ends otherwise: {odd[:5]}")
        if reading(place / verb.target) != pictures:
            raise Silent("the rerun's result gives other pictures")
        if odd := sorted(name for name in _names(place, scratch) - names if "/." in name):
            raise Left(", ".join(odd[:5]))

    return attempt


def _import_everything() -> None:
    import importlib
    import pkgutil

    import PIL.Image  # noqa: F401
    import rich.progress  # noqa: F401
    import torch._dynamo  # noqa: F401

    for module in ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "tensorrt_rtx", "safetensors.torch"):
        importlib.import_module(module)
    for package in (
        "scm_sdk",
        "scm_sdk.export",
        "scm_sdk.export.cli",
        "scm_sdk.train",
        "scm_sdk.evaluate",
        "scm_sdk.model",
    ):
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            if not info.name.endswith("__main__") and not info.ispkg:
                importlib.import_module(info.name)


def _content(target: Path, same: str) -> dict[str, str]:
    """Return the hashes of the files that are the same after every run."""
    from scm_sdk._util.files import sha256_file

    if target.is_file():
        return {"": sha256_file(target)}
    files = [path for path in sorted(target.rglob("*")) if path.is_file()]
    named = {str(path.relative_to(target)): path for path in files}
    return {name: sha256_file(path) for name, path in named.items() if re.match(same, name)}


def _names(place: Path, scratch: Path) -> set[str]:
    """Return the names of files next to and below the target and in the cache."""
    found = {f"work/{path.relative_to(place)}" for path in place.rglob("*") if ".reports" not in path.parts}
    cache = scratch / "cache"
    return found | {f"cache/{path.relative_to(cache)}" for path in cache.rglob("*")}


def _read_bundle(path: Path) -> bytes:
    from scm_sdk.inference.generator import Generator

    with Generator.from_pretrained(
        path, backend="onnxruntime", precision="fp32", num_inference_steps=1, num_threads=1
    ) as gen:
        images: np.ndarray = gen(2, seed=1, class_labels=[0, 2], output_type="raw").images
    return images.tobytes()


def _read_run(path: Path) -> bytes:
    """Open the checkpoint of a run once there is one; its weights change while it runs."""
    from scm_sdk.model.consistency import ConsistencyModel

    if (path / "config.json").exists():
        ConsistencyModel.from_pretrained(path)
    return b""


def _read_files(path: Path) -> bytes:
    from safetensors.numpy import load_file

    for file in path.glob("*.safetensors"):
        load_file(file)
    return b""


def _write_on(arguments: Sequence[str]) -> None:
    """Run a command again and again, each time in a process of its own; it may be refused."""
    rounds = 0
    while not Path(".reports/stop").exists():
        log = Path(f".reports/{os.getpid()}.{rounds}.command")
        child = fork(command([*arguments]), output=log)
        child.events()
        rounds += 1
        text = log.read_text(encoding="utf-8", errors="replace")
        if child.wait() < 0 or "Traceback" in text or "damaged" in text:
            raise RuntimeError(f"a writer ended with {child.wait()}: {text[-800:]}")
        time.sleep(0.5)


def _read_on(reading: Callable[[Path], bytes], path: Path, right: bytes) -> None:
    """Read a target again and again: it opens and gives the same, or is said to change too fast to be read."""
    from scm_sdk.errors import IntegrityError

    while not Path(".reports/stop").exists():
        try:
            if path.exists() and reading(path) != right:
                raise Silent("a reader got other pictures")
        except IntegrityError as exc:
            if "Open it again" not in str(exc):
                raise
        time.sleep(0.1)


def _raise_reported(reports: Path, codes: list[int]) -> None:
    for name, code in zip(("writer0", "writer1", "reader0", "reader1"), codes, strict=True):
        if code:
            text = _end(reports / name)
            raise (Silent if "Silent" in text else RuntimeError)(f"{name} ended with {code}: {text}")


def _end(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()[-600:]
