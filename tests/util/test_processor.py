"""The processor's class, and how many cores a container gives, as control groups of both versions say."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.containers import run_python
from scm_sdk._util import processor
from scm_sdk._util.processor import BF16_CLASSES, INT8_CLASSES, class_of, cpu_class, usable_cores
from scm_sdk.spec import SamplerSpec

CPU = Path("/sys/fs/cgroup/cpu")


def system(root: Path, cgroup: str, **files: str) -> Path:
    """Write a system's files; ``__`` in a name stands for a slash, ``_`` for itself."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup, encoding="utf-8")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "cgroup, files, cores",
    [
        ("0::/\n", {"cpuDOTmax": "200000 100000\n"}, 2),
        ("0::/\n", {"cpuDOTmax": "max 100000\n"}, 64),
        ("0::/\n", {"cpuDOTmax": "50000 100000\n"}, 1),
        ("0::/\n", {"cpuDOTmax": "250000 100000\n"}, 3),
        ("0::/a/b\n", {"a__cpuDOTmax": "400000 100000\n", "a__b__cpuDOTmax": "max 100000\n"}, 4),
        ("0::/a/b\n", {"a__cpuDOTmax": "400000 100000\n", "a__b__cpuDOTmax": "100000 100000\n"}, 1),
        ("0::/docker/123\n", {"cpuDOTmax": "300000 100000\n"}, 3),
        ("4:cpu:/\n0::/\n", {"cpu__cpuDOTcfs_quota_us": "-1\n", "cpu__cpuDOTcfs_period_us": "100000\n"}, 64),
        ("4:cpu:/a\n0::/\n", {"cpu__a__cpuDOTcfs_quota_us": "150000\n", "cpu__a__cpuDOTcfs_period_us": "100000\n"}, 2),
        (
            "4:cpu,cpuacct:/docker/1\n",
            {"cpu,cpuacct__cpuDOTcfs_quota_us": "800000\n", "cpu,cpuacct__cpuDOTcfs_period_us": "100000\n"},
            8,
        ),
        ("0::/\n", {"cpuDOTmax": "nonsense\n"}, 64),
        ("0::/\n", {"cpuDOTmax": ""}, 64),
        ("", {}, 64),
    ],
)
def test_a_quota_limits_the_cores(
    cgroup: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert usable_cores(system(tmp_path, cgroup, **files)) == cores


def test_the_affinity_limits_them_too_and_a_system_without_files_does_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cores(tmp_path) == 2
    assert usable_cores(system(tmp_path, "0::/\n", cpuDOTmax="100000 100000")) == 1


def test_libraries_choose_where_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, machine, threads in ((8, 8, None), (2, 8, 2)):
        monkeypatch.setattr(processor, "usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr(os, "cpu_count", lambda machine=machine: machine)
        assert processor.limited_threads() == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_cpuset_makes_no_error_lines_and_no_more_threads(backend: str, linear_bundle: Callable[..., Path]) -> None:
    pytest.importorskip(backend)
    path = linear_bundle(SamplerSpec(times=(1.5,), sample_shape=(3, 4, 4)))
    code = (
        "import os; os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})\n"
        f"from scm_sdk import Generator; g = Generator.from_pretrained({str(path)!r}, backend={backend!r})\n"
        "g(4, seed=1); print(len(os.listdir('/proc/self/task')))"
    )
    done = run_python(code, env={"OPENBLAS_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    if backend == "onnxruntime":
        assert int(done.stdout) == 1, "the caller's thread is enough"


@pytest.mark.skipif(not os.access(CPU, os.W_OK), reason="needs root and control groups of version 1")
def test_a_real_quota() -> None:
    group = CPU / f"scm-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("50000", encoding="utf-8")
        script = f'echo $$ > {group}/cgroup.procs; exec "$@"'
        code = "from scm_sdk._util.processor import concurrent_calls as c, usable_cores as u; print(u(), c(1))"
        done = run_python(code, under=[shutil.which("sh") or "sh", "-c", script, "sh"])
        assert done.stdout.split() == ["1", "1"], done.stderr
    finally:
        group.rmdir()


AVX2 = "sse4_1 avx avx2 fma"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "max_isa", "name", "bf16", "int8"),
    [
        (f"{AVX512} avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8", "", "amx_bf16", True, True),
        (f"{AVX512} avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8", "AVX512_CORE_BF16", "avx512_bf16", True, True),
        (f"{AVX512} avx512_vnni avx512_bf16 avx_vnni", "DEFAULT", "avx512_bf16", True, True),
        (f"{AVX512} avx512_vnni avx512_bf16", "avx512_core_vnni", "avx512_vnni", False, True),
        (f"{AVX512} avx512_vnni avx512_bf16", "AVX512_CORE", "avx512", False, False),
        (f"{AVX512} avx512_vnni avx512_bf16", "no such value", "avx512_bf16", True, True),
        (f"{AVX2} avx512f avx512_bf16", "", "avx2", False, False),
        (f"{AVX2} avx_vnni", "", "avx2_vnni", False, True),
        (f"{AVX2} avx_vnni", "AVX2", "avx2", False, False),
        ("fp asimd asimddp bf16 sve", "AVX2", "arm_bf16", True, True),
        ("fp asimd", "", "arm", False, False),
        ("", "", "unknown", False, False),
    ],
)
def test_the_class_is_what_the_flags_and_the_limit_allow(
    flags: str, max_isa: str, name: str, bf16: bool, int8: bool
) -> None:
    assert class_of(flags.split(), max_isa) == name
    assert (name in BF16_CLASSES, name in INT8_CLASSES) == (bf16, int8)


def test_the_class_of_this_machine_is_limited_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(processor, "_flags", lambda: frozenset(AVX512.split()))
    for value, name in (("", "avx512"), ("AVX2", "avx2"), ("SSE41", "sse4_1")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
        assert cpu_class() == name
