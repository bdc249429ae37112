"""Sites, and the npm package that they need."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.chromium import SOFTWARE_WEBGPU, Browser, chromium
from scm_sdk._util.cache_dir import cache_folder
from scm_sdk.export.edge.onnxruntime_web import PACKAGE, SHA256, VERSION
from scm_sdk.export.edge.site import write_site
from scm_sdk.export.edge.site_server import open_server

_USERS_CACHE = cache_folder()
"""Read before tests get caches of their own: 33 MB need not be fetched where the user has them."""


@pytest.fixture(scope="session")
def onnxruntime_web(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder or an archive of the npm package: from the user's cache; fetched with npm by slow tests alone."""
    if _USERS_CACHE is not None:
        folder = _USERS_CACHE / f"{PACKAGE}-{VERSION}"
        if all((folder / name).is_file() for name in SHA256):
            return folder
    if "slow" not in (request.config.getoption("markexpr") or "").replace("not slow", ""):
        pytest.skip(f"{PACKAGE} {VERSION} is not in the cache. scm-export web fetches it, and so do the slow tests")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600, check=False)
    if done.returncode:
        pytest.skip(f"the npm registry is unreachable: {done.stderr[-200:]}")
    return folder / f"{PACKAGE}-{VERSION}.tgz"


@pytest.fixture(scope="session")
def two_precisions(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the U-Net's bundle with fp16 graphs; read only."""
    from scm_sdk.export.precision.half import default_plan
    from scm_sdk.export.precision.variants import add_precision

    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("halves") / "bundle"))
    add_precision(path, default_plan("fp16"), num_samples=1)
    return path


@pytest.fixture(scope="session")
def site(two_precisions: Path, onnxruntime_web: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a site of the U-Net in fp32 and fp16; read only."""
    folder = tmp_path_factory.mktemp("site") / "site"
    write_site(two_precisions, folder, onnxruntime_web=onnxruntime_web)
    return folder


@pytest.fixture
def site_copy(site: Path, tmp_path: Path) -> Path:
    """Return a site that the test may damage."""
    return Path(shutil.copytree(site, tmp_path / "site"))


@pytest.fixture
def served() -> Iterator[Callable[[Path], str]]:
    """Return what serves a site and returns its URL."""
    servers = []

    def serve(folder: Path) -> str:
        server = open_server(folder)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://localhost:{server.server_address[1]}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a browser without WebGPU."""
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def software_gpu() -> Iterator[Browser]:
    """Return a browser whose WebGPU computes on the CPU."""
    with chromium(SOFTWARE_WEBGPU) as running:
        yield running
