"""Random damage to any file of a bundle, or to its ``.scmz``, is refused or changes nothing."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostile.campaign import SEED, Silent, run_campaign

pytestmark = pytest.mark.hostile
COUNT = int(os.environ.get("SCM_HOSTILE_DAMAGES", "10000"))
GRAPHS = [(precision, steps) for precision in ("fp32", "fp16", "int8") for steps in (1, 2)]


@pytest.mark.parametrize("subject, share", [("bundle", 0.75), ("bundle.scmz", 0.25)])
def test_damage_is_refused_or_changes_nothing(subject: str, share: float, material: Path, record: Any) -> None:
    setup = {"subject": str(material / subject), "seed": SEED}
    cases = range(round(COUNT * share))
    record(run_campaign(f"random damage, {subject}", "hostile.test_random_damage:prepare", cases, setup=setup))


def prepare(setup: dict[str, Any], scratch: Path) -> Callable[[int], None]:
    """Return what judges one damage, named by its number."""
    from scm_sdk._util.files import sha256_file
    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.inference.generator import Generator

    source = Path(setup["subject"])
    subject = scratch / source.name
    if source.is_dir():
        shutil.copytree(source, subject)
        files = sorted(path for path in subject.rglob("*") if path.is_file())
        files.append(subject / "scm_manifest.json")  # twice: no hash covers it
    else:
        shutil.copyfile(source, subject)
        files = [subject]
    digests = {path: sha256_file(path) for path in files}

    def pictures(precision: str, steps: int) -> tuple[Any, Any]:
        with Generator.from_pretrained(
            subject, backend="onnxruntime", precision=precision, num_inference_steps=steps, num_threads=1
        ) as gen:
            assert gen.source.bundle is not None
            return gen.source.bundle.manifest, gen(2, seed=3, class_labels=[0, 2], output_type="raw").images

    right = {graph: pictures(*graph) for graph in GRAPHS}
    assert len({images.tobytes() for _, images in right.values()}) == len(GRAPHS), "graphs that differ"
    shutil.rmtree(scratch / "cache", ignore_errors=True)

    def attempt(number: int) -> None:
        rng = random.Random(f"{setup['seed']}/{source.name}/{number}")
        path = rng.choice(files)
        graph = rng.choice(GRAPHS)
        with path.open("rb") as stream:
            whole = stream.read()
        damaged, told = damage(whole, rng)
        told = f"{told} of {path.relative_to(scratch)}"
        if damaged == whole:
            return
        path.write_bytes(damaged)
        try:
            refusals = []
            for look in (lambda: pictures(*graph), lambda: verify(graph)):
                try:
                    found = look()
                except Exception as exc:
                    refusals.append(exc)
                    continue
                if found[0] != right[graph][0]:
                    raise Silent(f"another manifest is believed: {told}")
                if found[1] is not None and not np.array_equal(found[1], right[graph][1]):
                    raise Silent(f"other pictures: {told}")
            for refusal in refusals:
                refusal.args = (f"{refusal} [{told}]",)
                raise refusal
        finally:
            path.write_bytes(whole)
            shutil.rmtree(scratch / "cache", ignore_errors=True)

    def verify(graph: tuple[str, int]) -> tuple[Any, Any]:
        folder = subject
        if subject.is_file():
            from scm_sdk.bundle.archive import unpack

            folder = scratch / "unpacked"
            try:
                unpack(subject, folder)
                return Bundle.open(folder).manifest, None
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        manifest = Bundle.open(folder, verify="digest").manifest
        for path in files:
            if path.name != "scm_manifest.json" and sha256_file(path) != digests[path]:
                raise Silent("verify passes a file that has changed")
        return manifest, None

    return attempt


def damage(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return damaged bytes and what was done to them."""
    size = min(len(data), round(2 ** rng.uniform(0, 16)))
    at = rng.randrange(len(data) - size + 1)
    kind = rng.choice(("flip", "flip", "flip", "cut", "zero", "swap", "insert", "remove", "append"))
    told = f"{kind} {size} at {at}"
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed), kind
    if kind == "cut":
        return data[:at], told
    if kind == "zero":
        return data[:at] + bytes(size) + data[at + size :], told
    if kind == "swap":
        to = rng.randrange(len(data) - size + 1)
        changed = bytearray(data)
        changed[at : at + size], changed[to : to + size] = data[to : to + size], data[at : at + size]
        return bytes(changed), f"{told} with {to}"
    if kind == "insert":
        return data[:at] + rng.randbytes(size) + data[at:], told
    if kind == "remove":
        return data[:at] + data[at + size :], told
    return data + rng.randbytes(size), told
