"""Parity: equal programs pass, and different ones fail with what differs."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from helpers.recorded_events import Recorded
from scm_sdk import Generator
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.manifest import Manifest, ParityRecord
from scm_sdk.errors import ConfigError, ParityError
from scm_sdk.evaluate.validate import validate_bundle
from scm_sdk.export.cli import main
from scm_sdk.export.precision.half import default_plan
from scm_sdk.export.precision.variants import add_precision
from scm_sdk.inference.parity.compare import FLOOR_FACTOR, MIN_PSNR_DB, ROUNDING_FLOOR, _check_least_psnr, compare
from scm_sdk.inference.parity.reference import noise_floor, run_reference
from scm_sdk.inference.request import make_example
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.model.sampler import Sampler
from scm_sdk.spec import SamplerSpec


class Altered:
    """A customer's own runtime: another backend's images with a change. Three members are enough."""

    def __init__(self, inner: Any, change: Any) -> None:
        self.spec: SamplerSpec = inner.spec
        self._inner, self._change = inner, change

    def sample(self, noise: Any, conditioning: Any) -> np.ndarray:
        images: np.ndarray = self._change(self._inner.sample(noise, conditioning))
        return images

    def close(self) -> None:
        pass


@pytest.mark.parametrize("batch", [1, 3, 5], ids=["one", "odd", "largest"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("backend", ["onnxruntime"])
def test_backends_match_the_reference(
    backend: str, steps: int, batch: int, ort: Generator, reference: Generator
) -> None:
    candidate = {"onnxruntime": ort}[backend].opened(steps).backend
    parity = compare(candidate, reference.opened(steps).backend, batches=(batch,))
    parity.raise_if_failed()
    assert (parity.candidate_backend, parity.reference_backend) == (backend, "torch")
    assert parity.max_abs <= 1e-5
    assert parity.num_samples == 32
    assert parity.overall == parity.by_batch[batch]


def test_the_threshold_comes_from_the_floor(ort: Generator, reference: Generator) -> None:
    parity = compare(ort, reference)
    assert parity
    assert list(parity.by_batch) == [1, 3, 5]
    assert parity.threshold == max(ROUNDING_FLOOR, FLOOR_FACTOR * parity.noise_floor)
    assert parity.max_abs == max(each.max_abs for each in parity.by_batch.values())
    assert 0 <= noise_floor(reference) < 1e-5
    assert 0 < noise_floor(ort) < 1e-5, "though it repeats itself bit for bit, whatever the batch"
    assert ort.compare(reference).overall == parity.overall


def test_a_comparison_prints_as_one_line(ort: Generator, reference: Generator) -> None:
    parity = compare(ort, reference, seeds=range(6), batches=(1, 5))
    line = str(parity)
    assert line.startswith(f"pass  {parity.candidate} on onnxruntime: max ") and "\n" not in line
    assert f"max {parity.max_abs:.2e}" in line and "6 seeds x batches 1, 5" in line and len(line) < 200
    failed = str(replace(parity, fault="a constant differs", reason="an example"))
    assert failed.startswith("FAIL  ") and failed.endswith("; reason: an example; a constant differs")


def test_a_reference_that_wavers_widens_the_threshold(ort: Generator) -> None:
    backend = ort.opened().backend
    wavering = Altered(backend, lambda images: images + np.float32(1e-3 * (len(images) == 3)))
    parity = compare(backend, wavering, seeds=range(6))
    assert parity.noise_floor == pytest.approx(2e-3, rel=1e-3)  # 1e-3 in units of sigma_data = 0.5
    assert parity.threshold == pytest.approx(4 * parity.noise_floor)
    assert parity
    assert parity.by_batch[1].max_abs == 0


def test_a_wrong_candidate_fails_and_names_the_worst_seed(ort: Generator, reference: Generator) -> None:
    backend = ort.opened().backend
    wrong = ort(32, seed=0, output_type="raw").images[17]

    def alter(images: np.ndarray) -> np.ndarray:
        hit = (images == wrong).all(axis=(1, 2, 3))
        moved: np.ndarray = images + np.float32(0.01) * hit.reshape(-1, 1, 1, 1)
        return moved

    parity = compare(Altered(backend, alter), reference.opened().backend)
    assert not parity
    assert parity.worst_seed == 17
    assert parity.max_abs == pytest.approx(0.02, rel=1e-3)
    message = (
        r"Altered on Altered, 2 steps, differs from TorchBackend on torch by 2\.0e-02 sigma_data "
        r"\(seed 17, mean .*\); expected at most \d\.\de-05 \(noise floor .*\)\. Do not ship it: look at seed 17"
    )
    with pytest.raises(ParityError, match=message):
        parity.raise_if_failed()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(ort: Generator, value: float) -> None:
    backend = ort.opened().backend

    def alter(images: np.ndarray) -> np.ndarray:
        images[-1, 0, 0, 0] = value
        return images

    for one, other in ((Altered(backend, alter), backend), (backend, Altered(backend, alter))):
        parity = compare(one, other, seeds=range(5), batches=(5,), threshold=1e9, reason="to see NaN fail alone")
        assert not parity
        assert (parity.worst_seed, parity.overall.finite) == (4, False)
        with pytest.raises(ParityError, match=r"NaN or infinity \(first at seed 4\)"):
            parity.raise_if_failed()
        plain = json.dumps(parity.to_dict(), allow_nan=False)
        assert json.loads(plain)["overall"]["max_abs"] is None


def test_loosening_needs_a_reason(ort: Generator) -> None:
    backend = ort.opened().backend
    with pytest.raises(ConfigError, match=r"1\.0e-02, looser than .* 1\.0e-05"):
        compare(backend, backend, seeds=range(5), threshold=1e-2)
    parity = compare(backend, backend, seeds=range(5), threshold=1e-2, reason="int8 on a CPU without VNNI")
    assert (parity.threshold, parity.reason) == (1e-2, "int8 on a CPU without VNNI")
    assert compare(backend, backend, seeds=range(5), threshold=1e-7).threshold == 1e-7  # tighter needs none


def test_wrong_arguments(ort: Generator, reference: Generator) -> None:
    backend = ort.opened().backend
    with pytest.raises(ConfigError, match=r"batches are \[6\], expected sizes in 1\.\.5"):
        compare(ort, reference, batches=(6,))
    with pytest.raises(ConfigError, match=r"batches are \[\], expected sizes"):
        compare(ort, reference, batches=())
    with pytest.raises(ConfigError, match="seeds holds 2, expected at least 5, the largest batch"):
        compare(ort, reference, seeds=[1, 2])
    with pytest.raises(ConfigError, match=r"different samplers \(times: .*1\.1"):
        compare(backend, reference, num_inference_steps=1)
    with pytest.raises(ConfigError, match="int cannot be compared, expected a Generator"):
        compare(ort, 3)  # type: ignore[arg-type]


def test_a_record_goes_into_the_manifest_and_opens_the_door(
    unet_copy: Path, ort: Generator, reference: Generator
) -> None:
    parity = compare(ort, reference, seeds=range(5))
    bundle = Bundle.open(unet_copy).with_parity(parity.record())
    assert bundle.manifest.parity[0].artifact == "onnx/fp32/2step/model.onnx"
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen(1, seed=0).info.backend == "onnxruntime"
    broken = replace(parity, overall=replace(parity.overall, finite=False, max_abs=math.nan))
    bundle = bundle.with_parity(broken.record())
    assert not Manifest.from_json(bundle.manifest.to_json()).parity[0].passed
    with Generator.from_pretrained(unet_copy) as gen:
        assert gen(1, seed=0).info.backend == "torch"


def test_the_noise_floor_reaches_the_distance_from_float64(reference: Generator, unet_checkpoint: Path) -> None:
    """The floor is measured without the truth and must be of its size: neither blind nor lenient."""
    spec = reference.opened().spec
    request = make_example(spec, range(32))
    noise, conditioning = request.inputs(0, 32)
    sampler = Sampler(ConsistencyModel.from_pretrained(unet_checkpoint), spec).eval().double()
    given = [torch.from_numpy(array) for array in (*noise, *conditioning.values())]
    with torch.inference_mode():
        exact = sampler(*(x.double() if x.is_floating_point() else x for x in given)).numpy()
    images = np.concatenate([reference.opened().backend.sample(*request.inputs(i, i + 1)) for i in range(32)])
    error = float(np.abs(exact - images).max()) / spec.sigma_data
    assert 0.25 * error < noise_floor(reference) < 4 * error


class Magnifier:
    """A right program whose samples magnify a rounding by factors from 1 to 10^4, as few samples of a real one do.

    ``order`` draws its rounding errors, as another order of its sums would.
    """

    def __init__(self, spec: SamplerSpec, order: int) -> None:
        self.spec, self._order = spec, order

    def sample(self, noise: Any, conditioning: Any) -> np.ndarray:
        images = []
        for z in noise[0]:
            own = int(np.abs(z[0, 0, 0]).view(np.uint32)) >> 4  # of the sample: an ulp more or less leaves it, mostly
            heavy = 10 ** (4 * np.random.default_rng(own).random() ** 3)
            rounding = np.random.default_rng([self._order, *z.view(np.uint32).ravel()[:4]]).standard_normal(z.shape)
            images.append(z + rounding.astype(np.float32) * np.float32(6e-8 * heavy))
        return np.stack(images)

    def close(self) -> None:
        pass


@given(first=st.integers(0, 2**40), num_seeds=st.integers(1, 64), data=st.data())
def test_a_right_program_passes_whatever_the_seeds_and_the_batches(
    ort: Generator, first: int, num_seeds: int, data: Any
) -> None:
    spec = ort.opened().spec
    most = min(num_seeds, spec.max_batch)
    batches = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=2))
    seeds = range(first, first + num_seeds)
    parity = compare(Magnifier(spec, 1), Magnifier(spec, 0), seeds=seeds, batches=batches)
    assert parity, (parity.max_abs, parity.threshold)


def test_the_shipped_model_passes_whatever_the_seeds_and_the_batches(avatars_bundle: Path) -> None:
    with (
        Generator.from_pretrained(avatars_bundle, backend="torch", num_threads=1) as reference,
        Generator.from_pretrained(avatars_bundle, backend="onnxruntime", precision="fp32", num_threads=1) as candidate,
    ):
        for first, num_seeds, batches in [
            (22, 1, [1]), (22, 2, [2]), (0, 8, [8]), (0, 32, [8]), (0, 32, [32]), (500, 40, [5, 16]), (0, 256, [32])
        ]:  # fmt: skip
            parity = compare(candidate, reference, seeds=range(first, first + num_seeds), batches=batches)
            assert parity, (first, num_seeds, batches, parity.max_abs, parity.threshold)
            assert parity.threshold < 1e-3, "a fault moves samples by more"


def test_each_precision_is_also_compared_with_the_one_above(ort: Generator, reference: Generator) -> None:
    run = run_reference(reference, seeds=range(6))
    first = compare(ort, run)
    second = compare(ort, run, baseline=first)
    assert first.step is None and first.baseline == "" and first.overall.max_abs > 0
    assert second.baseline == "onnx/fp32/2step/model.onnx on onnxruntime"
    assert second.step is not None and second.step.max_abs == 0, "the same graph twice"
    assert second.to_dict()["step"]["max_abs"] == 0 and "images" not in second.to_dict()


def test_validation_makes_as_many_seeds_as_the_largest_batch_needs(unet_copy: Path) -> None:
    """With 32 seeds asked for and a largest batch of 64, or two and five, the default must not refuse itself."""
    results = validate_bundle(unet_copy, precisions=["fp32"], num_seeds=2)
    assert all(results) and {each.num_samples for each in results} == {5}


def test_a_looser_least_psnr_needs_a_reason_wherever_it_is_asked(ort: Generator, reference: Generator) -> None:
    backend = ort.opened().backend
    with pytest.raises(ConfigError, match=r"min_psnr_db is 20\.0, looser than 25\.0 dB"):
        compare(backend, reference.opened().backend, seeds=range(5), min_psnr_db=20)
    why = {"min_psnr_db": 20, "reason": "a test"}
    assert compare(backend, reference.opened().backend, seeds=range(5), **why).reason == "a test"
    assert compare(backend, reference.opened().backend, seeds=range(5), min_psnr_db=60), "stricter needs none"
    with pytest.raises(ConfigError, match=r"looser than 55\.0 dB for fp16"):
        _check_least_psnr(45, "fp16")
    with pytest.raises(ConfigError, match=r"min_psnr_db is 90\.0 for fp32, .* expected a reason"):
        ort.compare(reference, seeds=range(5), min_psnr_db=90)


def losing(backend: Any, seeds: Sequence[int]) -> Altered:
    """Return a backend of which these samples, and no others, have 24 dB."""
    lost = backend.sample(*make_example(backend.spec, seeds).inputs(0, len(seeds)))

    def alter(images: np.ndarray) -> np.ndarray:
        hit = (images[:, None] == lost[None]).all(axis=(2, 3, 4)).any(axis=1)
        moved: np.ndarray = images + np.float32(0.12) * hit.reshape(-1, 1, 1, 1)
        return moved

    return Altered(backend, alter)


@pytest.mark.parametrize(
    ("num_seeds", "lost", "passes"),
    [(1, 1, False), (2, 1, False), (3, 1, True), (32, 4, True), (32, 5, False), (20, 4, False)],
)
def test_a_reduced_precision_fails_where_its_samples_show_that_it_is_lost(
    ort: Generator, num_seeds: int, lost: int, passes: bool
) -> None:
    """4 of 32 are within the chance of a precision of which 5 % are lost, 5 of 32 do not, and half never do."""
    backend = ort.opened().backend
    parity = compare(losing(backend, range(lost)), backend, seeds=range(num_seeds), batches=(1,), min_psnr_db=38)
    assert bool(parity) == parity.record().passed == passes
    assert parity.overall.worst_psnr_db == pytest.approx(24.4, abs=0.1)
    if not passes:
        with pytest.raises(ParityError, match=rf"95 % of {num_seeds} samples reach 24\.4 dB .*at least 38\.0 dB"):
            parity.raise_if_failed()


def test_a_seed_counts_once_whatever_the_number_of_splits(ort: Generator) -> None:
    backend = ort.opened().backend
    one, three = (compare(losing(backend, range(5)), backend, batches=b, min_psnr_db=38) for b in ([1], [1, 3, 5]))
    assert not one and not three and one.overall.psnr_p05_interval_db == three.overall.psnr_p05_interval_db


def test_a_fault_fails_whatever_the_numbers(unet_copy: Path) -> None:
    results = validate_bundle(
        unet_copy, backends=["onnxruntime"], precisions=["fp32"], steps=[1], num_seeds=5, batches=[5],
        examine=lambda *_: ("time, step 0", (99.0,)),
    )  # fmt: skip
    (parity,) = results
    assert parity.numbers_pass and not parity
    with pytest.raises(ParityError, match="time, step 0; expected"):
        parity.raise_if_failed()
    (record,) = Bundle.open(unet_copy).manifest.parity
    assert (record.passed, record.fault, record.psnr_by_step) == (False, "time, step 0", (99.0,))
    assert record.finding == "time, step 0"
    with Generator.from_pretrained(unet_copy, num_inference_steps=1) as gen:
        assert gen(1, seed=0).info.backend == "torch", "auto does not take what is faulty"


LOW = {"backends": ["onnxruntime"], "precisions": ["fp16"], "steps": [1]}


@pytest.fixture(scope="module")
def low_bundle(unet_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with the U-Net's 1-step graph in FP16, compared on 12 seeds."""
    path = Path(shutil.copytree(unet_bundle, tmp_path_factory.mktemp("low") / "bundle"))
    add_precision(path, default_plan("fp16"), steps=[1], num_samples=1)
    (parity,) = validate_bundle(path, **LOW, num_seeds=12, batches=[1, 5])
    assert parity
    return path


@pytest.fixture
def low_copy(low_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(low_bundle, tmp_path / "bundle"))


def record_of(path: Path) -> ParityRecord:
    (record,) = Bundle.open(path).manifest.parity
    return record


def test_compare_and_validate_apply_the_same_gate(low_bundle: Path) -> None:
    """fp16 has the gate of fp16, on either side of a comparison and for each caller."""
    record = record_of(low_bundle)
    with (
        Generator.from_pretrained(low_bundle, backend="torch", num_inference_steps=1) as reference,
        reference.reopen(backend="onnxruntime", precision="fp16") as low,
    ):
        parity = low.compare(reference, seeds=range(12), batches=[1, 5])
        parity.raise_if_failed()
        own = ("psnr_p05_db", MIN_PSNR_DB["fp16"])
        for each in (parity, reference.compare(low, seeds=range(12)), low.compare(low, seeds=range(12))):
            assert (each.gate, each.threshold) == (record.gate, record.threshold) == own
        found = parity.record()
        assert found.psnr_p05_db == pytest.approx(record.psnr_p05_db) and found.passed == record.passed
        with pytest.raises(ParityError):
            low.compare(reference, seeds=range(12), threshold=1e-5).raise_if_failed()


def test_a_record_states_what_was_judged_and_older_ones_are_read(low_bundle: Path) -> None:
    record = record_of(low_bundle)
    assert (record.num_samples, record.first_seed, record.batches) == (12, 0, (1, 5))
    assert record.gate == "psnr_p05_db" and record.psnr_p05_interval_db[0] == 0, "12 samples show no lower end"
    assert record.psnr_p05_interval_db[1] >= record.psnr_p05_db >= record.worst_psnr_db
    assert f"95 % of 12 samples reach {record.psnr_p05_db:.1f} dB of at least 55 dB" in record.finding
    old = msgspec.to_builtins(record)
    for name in ("psnr_p05_db", "psnr_p05_interval_db", "first_seed", "batches"):
        del old[name]
    read = msgspec.convert(old | {"gate": "psnr_db"}, ParityRecord)
    assert (read.gate, read.batches) == ("psnr_db", ()) and "dB of at least 55 dB" in read.finding


@pytest.mark.parametrize(
    "less",
    [{"num_seeds": 5, "batches": [1, 5]}, {"num_seeds": 12, "batches": [5]}, {"num_seeds": 5, "min_psnr_db": 99.0},
     {"num_seeds": 12, "batches": [1, 5], "min_psnr_db": 999.0}],
    ids=["fewer-seeds", "fewer-batches", "stricter-and-fewer", "stricter"],
)  # fmt: skip
def test_a_smaller_look_does_not_replace_a_fuller_proof(low_copy: Path, less: Any) -> None:
    before, events = (low_copy / "scm_manifest.json").read_bytes(), Recorded()
    (parity,) = validate_bundle(low_copy, **LOW, **less, events=events)
    assert bool(parity) == (less.get("min_psnr_db", 0) < 70)
    assert (low_copy / "scm_manifest.json").read_bytes() == before
    (note,) = events.notes
    assert "onnx/fp16/1step/model.onnx on onnxruntime: not recorded, the record of" in note


def test_a_fuller_look_and_a_fault_replace_the_record(low_copy: Path) -> None:
    validate_bundle(low_copy, **LOW, num_seeds=16, batches=[1, 3, 5], first_seed=7)
    record = record_of(low_copy)
    assert (record.num_samples, record.first_seed, record.batches, record.passed) == (16, 7, (1, 3, 5), True)
    validate_bundle(low_copy, **LOW, num_seeds=1, batches=[1], examine=lambda *_: ("time, step 0", ()))
    assert (record_of(low_copy).fault, record_of(low_copy).passed) == ("time, step 0", False)


def test_validation_without_a_record_edits_nothing(low_copy: Path) -> None:
    before = {file: file.read_bytes() for file in low_copy.rglob("*") if file.is_file()}
    look = ["validate", str(low_copy), "--no-record", "--precision", "fp16", "--backend", "onnxruntime"]
    run = CliRunner().invoke(main, [*look, "--num-seeds", "64"])
    assert run.exit_code == 0, run.output
    assert CliRunner().invoke(main, [*look, "--min-psnr", "999"]).exit_code == 3
    assert {file: file.read_bytes() for file in low_copy.rglob("*") if file.is_file()} == before


def test_a_bundle_that_cannot_be_written_is_judged(low_bundle: Path) -> None:
    """As a container sees it: files of another owner. Root may write anything, so it becomes another user."""
    folder = Path(tempfile.mkdtemp())
    path = Path(shutil.copytree(low_bundle, folder / "bundle"))
    for each in (folder, path, *path.rglob("*")):
        each.chmod(0o555 if each.is_dir() else 0o444)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(PermissionError):
            (path / "new").touch()
        arguments = ["validate", str(path), "--precision", "fp16", "--backend", "onnxruntime", "--num-seeds", "16"]
        run = CliRunner().invoke(main, arguments)
    finally:
        if root:
            os.seteuid(0)
        for each in (folder, path, *(each for each in path.rglob("*") if each.is_dir())):
            each.chmod(0o755)
        shutil.rmtree(folder)
    assert run.exit_code == 0, run.output
    assert f"nothing was recorded: {path} cannot be written" in run.stderr
