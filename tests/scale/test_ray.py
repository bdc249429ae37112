"""Batch generation on Ray: an actor, the driver or a node is killed; the shards are those of a run without kills."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.servers import eventually, write_served_bundle
from scm_sdk._util.lazy import is_installed
from scm_sdk.inference.generator import Generator
from scm_sdk.scale.plan import SamplePlan, make_plan, start_or_resume
from scm_sdk.scale.run import Worker, run_local
from scm_sdk.scale.shards import missing_shards, record_name
from scm_sdk.scale.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed("ray"), reason="the extra ray is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes as Linux shows them"),
]
SHARDS = 40

CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = {}
for _ in range(2):
    node = cluster.add_node(num_cpus=2)
    nodes[str(node.all_processes["raylet"][0].process.pid)] = node
print(cluster.address, *nodes, flush=True)
cluster.remove_node(nodes[sys.stdin.readline().strip()], allow_graceful=False)
print("removed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""
"""A cluster of a head without CPUs and two nodes; it loses the node whose raylet is named on its input."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose images take a part of a second, so that a kill comes between them."""
    return write_served_bundle(tmp_path_factory.mktemp("slow") / "linear", steps=(1,), matmuls=40)


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SamplePlan, dict[str, bytes]]:
    """The plan, and the files of a run in this process."""
    out = tmp_path_factory.mktemp("whole")
    with Generator.from_pretrained(bundle, backend="onnxruntime", num_inference_steps=1) as gen:
        plan = make_plan(gen, num_images=SHARDS, shard_size=1)
    start_or_resume(Store(out), plan)
    run_local(Worker(bundle=str(bundle), out=str(out), plan=plan))
    return plan, files(out)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Ray asks for a token that is this test's."""
    return os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def command(bundle: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "scm_sdk.export.cli", "sample", str(bundle), "-o", str(out), "--num-images", str(SHARDS),
        "--num-shards", str(SHARDS), "--backend", "onnxruntime", "--steps", "1", "--threads", "1", "--executor", "ray",
        "--workers", "2", "--cpus-per-worker", "0.25", "--json", *more,
    ]  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".partial" not in path.name)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def actors(above: int) -> Iterator[tuple[int, int]]:
    """Yield the process of each actor below another process, and that of its raylet."""
    parents: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found = re.search(rb"^PPid:\t(\d+)", (path / "status").read_bytes(), re.MULTILINE)
            names[int(path.name)] = (path / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        assert found is not None
        parents[int(path.name)] = int(found[1])
    for pid, name in names.items():
        if b"MapWorker" not in name:
            continue
        upper = pid
        while upper > 1 and upper != above:
            upper = parents.get(upper, 0)
        if upper == above:
            yield pid, parents[pid]


def started(process: subprocess.Popen[str], out: Path, plan: SamplePlan) -> bool:
    """Return whether the first shard is complete; the others are not."""
    assert process.poll() is None, process.communicate()
    return any((out / record_name(shard)).exists() for shard in range(plan.num_shards))


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def test_a_killed_actor_loses_nothing(bundle: Path, whole, environment: dict[str, str], tmp_path: Path) -> None:
    plan, wanted = whole
    out = tmp_path / "out"
    process = run(command(bundle, out), environment)
    eventually(lambda: started(process, out, plan))
    victim, _ = next(actors(process.pid))
    os.kill(victim, signal.SIGKILL)
    assert missing_shards(Store(out), plan), "it was killed before the end"
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["written"] == SHARDS
    assert files(out) == wanted


def test_a_killed_driver_is_resumed_by_the_same_command(
    bundle: Path, whole, environment: dict[str, str], tmp_path: Path
) -> None:
    plan, wanted = whole
    out = tmp_path / "out"
    process = run(command(bundle, out), environment)
    eventually(lambda: started(process, out, plan))
    process.kill()
    process.communicate()
    assert missing_shards(Store(out), plan), "it was killed before the end"
    again = run(command(bundle, out), environment)
    stdout, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert 0 < json.loads(stdout)["written"] < SHARDS
    assert files(out) == wanted


def test_a_lost_node_loses_nothing(bundle: Path, whole, environment: dict[str, str], tmp_path: Path) -> None:
    plan, wanted = whole
    out = tmp_path / "out"
    cluster = run([sys.executable, "-c", CLUSTER], environment)
    assert cluster.stdin is not None and cluster.stdout is not None
    try:
        address, *raylets = cluster.stdout.readline().split()
        process = run(command(bundle, out, "--ray-address", address), environment)
        eventually(lambda: started(process, out, plan))
        raylet = str(next(actors(cluster.pid))[1])
        assert raylet in raylets
        cluster.stdin.write(f"{raylet}\n")
        cluster.stdin.flush()
        assert cluster.stdout.readline() == "removed\n"
        assert missing_shards(Store(out), plan), "it was lost before the end"
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        assert json.loads(stdout)["written"] == SHARDS
        assert files(out) == wanted
        cluster.communicate("end\n")
    finally:
        cluster.kill()
        cluster.wait()
