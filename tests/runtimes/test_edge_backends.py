"""Backends of a fixed batch size: what they refuse, what they translate, parts of a batch, threads."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers.edge_bundles import edge_params, with_edge
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.errors import BackendFailure, BackendUnavailable, ConfigError, IntegrityError, SchemaError, ShapeError
from scm_sdk.export.edge.runtimes import RUNTIMES
from scm_sdk.inference.backends import BACKENDS, Backend, open_backend
from scm_sdk.inference.generator import Generator
from scm_sdk.noise import draw_noise
from scm_sdk.spec import SamplerSpec

# Of the libraries themselves, while they are imported.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


@pytest.fixture(scope="module", params=edge_params())
def bundle(request: pytest.FixtureRequest, unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_edge(unet_bundle, request.param, tmp_path_factory.mktemp("edge") / request.param, steps=[2])


@pytest.fixture
def artifact(bundle: Path, tmp_path: Path) -> Path:
    """Return the artifact in a folder of its own, to be damaged."""
    path = Path(RUNTIMES[bundle.name].path("fp32", 2))
    return Path(shutil.copytree(bundle / path.parent, tmp_path / "artifact")) / path.name


@pytest.fixture
def spec(bundle: Path) -> SamplerSpec:
    return Bundle.open(bundle, verify="none").spec(2)


def inputs(spec: SamplerSpec, batch: int) -> tuple[list[Any], dict[str, np.ndarray]]:
    return list(draw_noise(spec, range(batch))), {"class_labels": np.arange(batch, dtype=np.int64) % spec.num_classes}


def test_any_batch_is_run_in_parts_and_from_many_threads(bundle: Path, artifact: Path, spec: SamplerSpec) -> None:
    opened = open_backend(bundle.name, artifact, spec)
    assert isinstance(opened, Backend) and BACKENDS[bundle.name].one_at_a_time
    jobs = [inputs(spec, batch) for batch in (1, 2, 3, 5)] * 3
    alone = [opened.sample(*job) for job in jobs]
    np.testing.assert_array_equal(alone[3][0], alone[0][0])
    with ThreadPoolExecutor(4) as pool:
        for one, each in zip(alone, pool.map(lambda job: opened.sample(*job), jobs), strict=True):
            np.testing.assert_array_equal(one, each)
    first = alone[0].copy()
    opened.sample(*inputs(spec, 5))
    np.testing.assert_array_equal(alone[0], first), "images are the caller's"
    opened.close()
    opened.close()
    with pytest.raises(BackendFailure, match=r"was closed, expected an open one"):
        opened.sample(*inputs(spec, 1))


def test_inputs_that_do_not_fit_are_refused(bundle: Path, artifact: Path, spec: SamplerSpec) -> None:
    opened = open_backend(bundle.name, artifact, spec)
    noise, labels = inputs(spec, 2)
    with pytest.raises(ShapeError, match=r"a batch of 6; expected 1\.\.5"):
        opened.sample([np.concatenate([a] * 3) for a in noise], labels)
    with pytest.raises(ShapeError, match=r"int32, expected .* int64"):
        opened.sample(noise, {"class_labels": labels["class_labels"].astype(np.int32)})


def test_another_sampler_is_refused(bundle: Path, artifact: Path, spec: SamplerSpec) -> None:
    with pytest.raises(IntegrityError, match=r"has inputs and outputs .*; expected .*of different exports"):
        open_backend(bundle.name, artifact, spec.with_steps(1))
    wider = msgspec.structs.replace(spec, sample_shape=(3, 8, 9))
    with pytest.raises(IntegrityError, match=r"expected .*\(1, 3, 8, 9\)"):
        open_backend(bundle.name, artifact, wider)


@pytest.mark.parametrize("keep", [0, 100])
def test_a_truncated_file_is_refused(bundle: Path, artifact: Path, spec: SamplerSpec, keep: int) -> None:
    artifact.write_bytes(artifact.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match=r"cannot load .*artifact.*make the artifact again"):
        open_backend(bundle.name, artifact, spec)
    artifact.unlink()
    with pytest.raises(IntegrityError, match="is not there"):
        open_backend(bundle.name, artifact, spec)


def test_devices_and_threads(bundle: Path, artifact: Path, spec: SamplerSpec) -> None:
    with pytest.raises(BackendUnavailable, match=r"device is 'cuda:1', but backend .* runs on the CPU"):
        open_backend(bundle.name, artifact, spec, device="cuda:1")
    with pytest.raises(ConfigError, match=r"num_threads is 0"):
        open_backend(bundle.name, artifact, spec, num_threads=0)
    if bundle.name == "executorch":
        with pytest.raises(ConfigError, match=r"num_threads is 1, expected None"):
            open_backend(bundle.name, artifact, spec, num_threads=1)
    else:
        open_backend(bundle.name, artifact, spec, num_threads=1).sample(*inputs(spec, 1))


def test_a_changed_artifact_is_refused_before_its_library_reads_it(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    path = copy / RUNTIMES[bundle.name].path("fp32", 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"sha256"):
        Generator.from_pretrained(copy, backend=bundle.name)


def test_names_say_the_format(bundle: Path, tmp_path: Path) -> None:
    """A library goes by the name: an artifact under another one is refused."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = Bundle.open(copy).manifest
    renamed = tuple(
        msgspec.structs.replace(a, path="README.md") if a.format == bundle.name else a for a in manifest.artifacts
    )
    from scm_sdk.bundle.verify import check_manifest

    with pytest.raises(SchemaError, match=r"'README\.md' is said to be of format .*, expected NAME\."):
        check_manifest(msgspec.structs.replace(manifest, artifacts=renamed))
