"""What a container meets: other users, no home, a read-only disk, a share of the processors."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from containers import run_python
from scm_sdk.errors import IntegrityError
from scm_sdk.extend import extend_bundle
from scm_sdk.generator import Generator
from scm_sdk.manifest import Artifact
from scm_sdk.spec import SamplerSpec

SPEC = SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4))
GRAPH = "onnx/fp32/1step/model.onnx"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[int, set[str]]:
    """The modes of the files below a folder, each with the names of those that have it."""
    found: dict[int, set[str]] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found.setdefault(path.stat().st_mode & 0o777, set()).add(path.relative_to(folder).as_posix())
    return found


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read_what_is_written(
    mask: int, expected: int, tmp_path: Path, unet_checkpoint: Path, toy, npz, pkl
) -> None:
    from scm_sdk.model.consistency import ConsistencyModel
    from scm_sdk.pickles import convert
    from scm_sdk.train.distributed import World
    from scm_sdk.train.sharded_state import save_run
    from test_run_state import fresh

    run = fresh(npz, tmp_path)
    with umask(mask):
        ConsistencyModel.from_pretrained(unet_checkpoint).save_pretrained(tmp_path / "out/checkpoint")
        toy.export(tmp_path / "out/bundle")
        with extend_bundle(tmp_path / "out/bundle") as draft:
            draft.path("onnx/fp16/1step/model.onnx").write_bytes(b"graph")
            draft.add(Artifact(path="onnx/fp16/1step/model.onnx", format="onnx", num_inference_steps=1), [])
        convert.convert_pickle(pkl, tmp_path / "out/imported")
        for sharded in (False, True):
            (tmp_path / f"out/run-{sharded}").mkdir()
            save_run(tmp_path / f"out/run-{sharded}", run.state, World(), sharded=sharded)
    found = modes(tmp_path / "out")
    assert set(found) == {expected}, found
    assert {"checkpoint/diffusion_pytorch_model.safetensors", "bundle/golden/golden.safetensors"} <= found[expected]


def test_what_is_not_opened_need_not_be_there(tmp_path: Path, unet_copy: Path) -> None:
    shutil.rmtree(unet_copy / "denoiser")
    with pytest.raises(IntegrityError, match=r"denoiser.*is missing"):
        Generator.from_pretrained(unet_copy, backend="onnxruntime")
    with Generator.from_pretrained(unet_copy, backend="onnxruntime", verify="none") as gen:
        assert len(gen(2, seed=1).images) == 2
    with pytest.raises(IntegrityError, match="denoiser is not there"):
        Generator.from_pretrained(unet_copy, backend="torch", verify="none")


@pytest.mark.parametrize("path, verify", [("denoiser/diffusion_pytorch_model.safetensors", "digest"), (GRAPH, "none")])
def test_an_unreadable_file_is_not_called_damaged(path: str, verify: str, unet_copy: Path) -> None:
    (unet_copy / path).chmod(0)
    done = run_python(
        "from scm_sdk import Generator\n"
        f"Generator.from_pretrained({str(unet_copy)!r}, verify={verify!r}, num_inference_steps=1, "
        "backend='onnxruntime')",
        unprivileged=True,
        env={"HOME": "/"},
    )
    said = done.stderr.strip().splitlines()[-1]
    assert "IntegrityError" in said and f"{path} cannot be read: Permission denied. Change its mode" in said
