"""Whether an engine may run here: one answer for plans and backends, each refusal with its remedy."""

import dataclasses
from pathlib import Path

import msgspec
import pytest

from scm_sdk._util.cache_dir import cache_folder
from scm_sdk._util.gpu import Gpu, current_gpu, gpus
from scm_sdk._util.processor import platform_tag
from scm_sdk.bundle.manifest import Artifact, EngineFacts, ParityRecord
from scm_sdk.engines import compatibility
from scm_sdk.engines.compatibility import (
    EngineHost,
    incompatibility_reason,
    installed_version,
    is_trusted,
    performance_warning,
)
from scm_sdk.engines.tensorrt import version_tuple
from scm_sdk.inference import selection

A10 = Gpu(index=0, name="NVIDIA A10", compute_capability="8.6", memory_bytes=24 << 30, driver="13.0")
FACTS = EngineFacts(
    library_version="1.7.1.116", compute_capabilities=("8.0", "8.6"), platform="linux-x86_64", batch=(1, 8, 32)
)
HOST = EngineHost(
    gpu=A10, versions={"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}, platform="linux-x86_64",
    trusts=lambda sha256: True,
)  # fmt: skip


def facts(**changes) -> EngineFacts:
    return msgspec.structs.replace(FACTS, **changes)


def host(**changes) -> EngineHost:
    return dataclasses.replace(HOST, **changes)


def gpu(capability: str, name: str = "NVIDIA X") -> Gpu:
    return dataclasses.replace(A10, compute_capability=capability, name=name)


def test_what_fits() -> None:
    assert incompatibility_reason("tensorrt_rtx", FACTS, HOST) is None
    plus = facts(library_version="11.4.0.106", compute_capabilities=("8.0",), hardware_compatibility="ampere_plus")
    assert incompatibility_reason("tensorrt", plus, HOST) is None
    newer = facts(library_version="10.13.0.35", version_compatible=True)
    assert incompatibility_reason("tensorrt", newer, HOST) is None


@pytest.mark.parametrize(
    ("flavor", "engine", "machine", "reason"),
    [
        ("tensorrt_rtx", FACTS, host(platform="windows-amd64"), "built for linux-x86_64, this is windows-amd64"),
        ("tensorrt_rtx", FACTS, host(versions={}), "tensorrt_rtx is not installed"),
        ("tensorrt_rtx", facts(library_version="1.7.1.115"), HOST, "1.7.1.115, 1.7.1.116 is installed"),
        ("tensorrt", facts(library_version="11.5.0.1", version_compatible=True), HOST, "11.5.0.1 or later, 11.4.0.106"),
        ("tensorrt_rtx", FACTS, host(gpu=None), "no NVIDIA GPU here"),
        ("tensorrt_rtx", FACTS, host(gpu=gpu("8.9")), "built for 8.0, 8.6, this NVIDIA X is 8.9"),
        (
            "tensorrt",
            facts(library_version="11.4.0.106", hardware_compatibility="ampere_plus"),
            host(gpu=gpu("7.5")),
            "and any later, this NVIDIA X is 7.5",
        ),
    ],
)
def test_what_does_not_fit_and_the_command_that_helps(flavor, engine, machine, reason) -> None:
    found = incompatibility_reason(flavor, engine, machine)
    assert found is not None and reason in found
    if "built" in found:
        assert "scm-export engine BUNDLE --target sm_" in found


def test_the_command_names_the_flavor_that_builds_there() -> None:
    h100, t4 = gpu("9.0", "NVIDIA H100"), gpu("7.5", "T4")
    old = facts(library_version="10.13.0.35")
    assert str(incompatibility_reason("tensorrt", old, HOST)).endswith(
        "scm-export engine BUNDLE --target sm_86 --flavor tensorrt"
    )
    assert str(incompatibility_reason("tensorrt_rtx", FACTS, host(gpu=t4))).endswith(
        "scm-export engine BUNDLE --target sm_75"
    )
    # TensorRT-RTX builds nothing for an H100.
    assert str(incompatibility_reason("tensorrt_rtx", FACTS, host(gpu=h100))).endswith(
        "BUNDLE --target sm_90 --flavor tensorrt"
    )


def test_a_number_that_no_gpu_has_is_not_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "gpus", lambda: (A10,))
    monkeypatch.setattr(compatibility, "current_gpu", lambda index: A10 if index == 0 else None)
    ninth = dataclasses.replace(HOST, gpu=None, no_gpu=EngineHost.here(device="cuda:9").no_gpu)
    assert incompatibility_reason("tensorrt_rtx", FACTS, ninth) == "no GPU cuda:9 here, only cuda:0 (NVIDIA A10)"
    assert EngineHost.here(device="cuda:0").gpu == A10


def test_an_engine_of_another_board_is_slower_not_wrong() -> None:
    tuned = facts(gpu="NVIDIA A10G")
    assert performance_warning("tensorrt", tuned, HOST) == "tuned on a NVIDIA A10G, this is a NVIDIA A10"
    assert (
        performance_warning("tensorrt_rtx", tuned, HOST)
        == performance_warning("tensorrt", facts(gpu="NVIDIA A10"), HOST)
        == ""
    )


def test_trust_is_given_by_name_or_by_having_built_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compatibility.TRUST_VARIABLE, raising=False)
    assert not is_trusted("0" * 64)
    assert EngineHost.here(trust_engines=True).trusts("0" * 64)
    compatibility.remember_built("0" * 64)
    compatibility.remember_built("0" * 64)
    assert is_trusted("0" * 64) and not is_trusted("1" * 64)
    assert not is_trusted("../built/" + "0" * 64) and not is_trusted("")


def test_this_machine_is_described_without_loading_anything() -> None:
    here = EngineHost.here()
    assert here.platform == platform_tag() and here.gpu == current_gpu()
    assert EngineHost.here(device="cpu").gpu is None and EngineHost.here(device="cuda:99").gpu is None
    assert isinstance(gpus(), tuple)
    assert version_tuple("1.7.1.116") == (1, 7, 1, 116)
    assert installed_version("tensorrt_rtx") is None or version_tuple(str(installed_version("tensorrt_rtx"))) >= (1, 7)


@pytest.fixture(scope="module")
def where_a_fixture_of_a_module_builds() -> Path:
    folder = cache_folder()
    assert folder is not None
    return folder


def test_no_fixture_builds_into_the_users_cache(where_a_fixture_of_a_module_builds: Path, tmp_path: Path) -> None:
    """Those of a module run before ``cache_home``; what they built was in the real cache and was not trusted."""
    assert where_a_fixture_of_a_module_builds.is_relative_to(tmp_path.parents[1])


@pytest.fixture
def both_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = selection.is_installed
    monkeypatch.setattr(selection, "is_installed", lambda name: True if name.startswith("tensorrt") else real(name))


def plan(*engines: tuple[str, EngineFacts], **changes):
    artifacts = [
        Artifact(path="denoiser", format="safetensors"),
        Artifact(path="graph", format="onnx", num_inference_steps=2),
    ]
    artifacts += [
        Artifact(path=path, format="tensorrt_rtx", precision="fp16", num_inference_steps=2, engine=engine)
        for path, engine in engines
    ]
    parity = [
        ParityRecord(
            artifact=path, reference="denoiser", backend=backend, threshold=1, noise_floor=0, max_abs=0, num_samples=4,
            passed=True,
        )
        for path, backend in [("graph", "onnxruntime"), *((path, "tensorrt_rtx") for path, _ in engines)]
    ]  # fmt: skip
    return selection.make_plan(artifacts, num_inference_steps=2, parity=parity, **({"host": HOST} | changes))


def test_an_engine_that_fits_goes_first_and_one_for_this_gpu_alone_before_all(both_installed) -> None:
    found = plan(
        ("all", FACTS), ("mine", facts(compute_capabilities=("8.6",))), ("other", facts(compute_capabilities=("8.9",)))
    )
    assert [row.artifact for row in found.accepted] == ["mine", "all", "graph", "denoiser"]
    (rejected,) = (row for row in found.rejected if row.artifact == "other")
    assert "built for 8.9, this NVIDIA A10 is 8.6" in rejected.reason


def test_the_plan_says_why_engines_do_not_run(both_installed) -> None:
    def reason(**changes) -> str:
        (row,) = (row for row in plan(("e", FACTS), **changes) if row.artifact == "e")
        assert not row.accepted
        return row.reason

    assert reason(host=host(gpu=None)) == "no NVIDIA GPU here"
    assert reason(device="cpu") == "device='cpu' was asked for, engines run on GPUs"
    assert "executable code" in reason(host=host(trusts=lambda sha256: False)) and "trust_engines=True" in reason(
        host=host(trusts=lambda sha256: sha256 == "another"), sha256=lambda path: "this"
    )
    assert "does not say where" in next(
        row.reason
        for row in selection.make_plan(
            [Artifact(path="e", format="tensorrt_rtx", num_inference_steps=2)], num_inference_steps=2
        )
    )


def test_without_engines_nobody_looks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineHost, "here", lambda **_: pytest.fail("looked"))
    assert selection.make_plan([Artifact(path="denoiser", format="safetensors")], num_inference_steps=2).chosen
