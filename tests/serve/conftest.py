"""What tests of the server share."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.servers import RunningServer, running, write_served_bundle
from scm_sdk.inference.generator import Generator

if find_spec("starlette") is None:  # the extra serve, which the extra test brings
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def served_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of linear graphs of 1 and 2 steps; read only."""
    return write_served_bundle(tmp_path_factory.mktemp("served") / "linear")


@pytest.fixture(scope="session")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle whose batches take tens of milliseconds; read only."""
    return write_served_bundle(tmp_path_factory.mktemp("slow") / "linear", steps=(1,), matmuls=20, max_batch=2)


@pytest.fixture(scope="module")
def server(served_bundle: Path) -> Iterator[RunningServer]:
    """Return a running server of ``served_bundle``."""
    with running(served_bundle, "--max-queue", "128", "--max-body", "20000") as found:
        yield found


@pytest.fixture(scope="session")
def local(served_bundle: Path) -> Iterator[Generator]:
    """Return the same model in this process."""
    with Generator.from_pretrained(served_bundle, num_threads=1) as gen:
        yield gen
