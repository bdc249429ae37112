"""Kill a writer of bundles at each of its file-system calls, and report what is then there and what another run makes.

A script, ``killed_writer.py FOLDER BUNDLE VERB STRIDE``. It prints as JSON, for every STRIDE-th call, at which the
writer was killed, ``[what opens, what opens after another run, how that ended, what lies there]``; what opens is named
``old``, ``new`` or by its error.
One process that has imported everything forks the writers, so that each of them really dies.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from toy_bundles import ToyBundle, write_linear_graph

from scm_sdk.bundle.archive import pack, unpack
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.bundle.manifest import Artifact, ParityRecord
from scm_sdk.errors import ScmError

GRAPH = "onnx/fp32/1step/model.onnx"
NOTES = "notes.txt"
"""A file that no manifest lists: such a bundle is changed in place."""
DEADLY = ("replace", "rename", "fsync", "link", "unlink", "mkdir", "rmdir", "chmod")


def fork(work: Callable[[], object], *, die_at: int = 0) -> int:
    """Run ``work`` in a process that kills itself just before its ``die_at``-th call; return how it ended."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = die_at

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*names: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*names, **options)

        return counted

    from scm_sdk._util import publish

    for name in DEADLY:
        setattr(os, name, deadly(getattr(os, name)))
    publish.exchange = deadly(publish.exchange)  # type: ignore[assignment]
    try:
        work()
        os._exit(0)
    except ScmError as exc:
        print(exc, file=sys.stderr)
        os._exit(3)


def extend(path: Path) -> None:
    """Add one graph and replace another."""
    with extend_bundle(path) as draft:
        for precision in ("fp32", "fp16"):
            name = f"onnx/{precision}/1step/model.onnx"
            write_linear_graph(draft.path(name), ToyBundle.specs[0], gain=0.125)
            draft.add(Artifact(path=name, format="onnx", precision=precision, num_inference_steps=1), [])


def record(path: Path) -> None:
    """Record a comparison; a generated card changes with it."""
    parity = ParityRecord(
        artifact=GRAPH, reference="denoiser", backend="onnxruntime", threshold=1.0, noise_floor=0.1, max_abs=0.5,
        num_samples=4, passed=True,
    )  # fmt: skip
    Bundle.open(path).with_parity(parity)


def is_new(path: Path) -> bool:
    """Return whether a bundle holds what ``extend`` or ``record`` adds."""
    manifest = Bundle.open(path).manifest
    return bool(manifest.parity) or any(artifact.precision == "fp16" for artifact in manifest.artifacts)


def state(path: Path) -> str:
    """Return ``absent``, ``old`` or ``new``, or what refuses."""
    if not os.path.lexists(path):
        return "absent"
    try:
        if path.is_dir():
            return "new" if is_new(path) else "old"
        unpack(path, path.with_name("unpacked"))
        shutil.rmtree(path.with_name("unpacked"))
        return "old"
    except ScmError as exc:
        return str(exc)


def survey(folder: Path, bundle: Path, verb: str, stride: int) -> list[list[object]]:
    name, _, way = verb.partition(" ")
    copy, out = folder / "bundle", folder / ("bundle" if name in ("extend", "record") else "out")
    work: dict[str, Callable[[], object]] = {
        "extend": lambda: extend(copy),
        "record": lambda: record(copy),
        "copy": lambda: Bundle.open(copy).save_pretrained(out),
        "pack": lambda: pack(copy, out),
    }
    found: list[list[object]] = []
    for event in range(1, 1000, stride):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle, copy)
        if way:
            (copy / NOTES).write_text("mine", encoding="utf-8")
        code = fork(work[name], die_at=event)
        if code == 0:
            return found
        assert code == -signal.SIGKILL, code
        before = state(out)
        code = fork(work[name])
        left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name.startswith("."))
        assert not way or (copy / NOTES).read_text("utf-8") == "mine"
        found.append([before, state(out), code, left])
    raise AssertionError("the writer never ends")


if __name__ == "__main__":
    print(json.dumps(survey(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
