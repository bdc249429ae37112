"""Parity: equal programs pass, different ones fail, and the numbers are the right numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scm_sdk import Generator
from scm_sdk.bundle import Bundle
from scm_sdk.errors import ConfigError, ParityError, ShapeError
from scm_sdk.evaluate.difference import difference, ssim
from scm_sdk.evaluate.gate import validate_bundle
from scm_sdk.evaluate.parity import FLOOR_FACTOR, ROUNDING_FLOOR, _check_least_psnr, compare
from scm_sdk.evaluate.reference import noise_floor, run_reference
from scm_sdk.manifest import Manifest
from scm_sdk.request import make_request
from scm_sdk.spec import SamplerSpec

SPEC = SamplerSpec(times=(1.5,), sample_shape=(3, 16, 16))


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


# The gate


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
    assert noise_floor(ort) == 0, "ONNX Runtime on a CPU repeats itself bit for bit, whatever the batch"
    assert ort.compare(reference).overall == parity.overall


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
    with pytest.raises(ConfigError, match=r"threshold is 1\.0e-02, looser than the derived 1\.0e-05 .*a reason"):
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
    with pytest.raises(ConfigError, match=r"different samplers \(times: .*1\.1.* and .*\), expected the same"):
        compare(backend, reference, num_inference_steps=1)
    with pytest.raises(ConfigError, match="int cannot be compared, expected a Generator or an object with"):
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


# The numbers


def pair(seed: int, scale: float, shape: tuple[int, ...] = (4, 3, 16, 16)) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    a = draw.uniform(-1, 1, shape).astype(np.float32)
    return a, a + np.float32(scale) * draw.standard_normal(shape).astype(np.float32)


def test_the_numbers_of_a_known_difference() -> None:
    a = np.zeros((2, 3, 16, 16), np.float32)
    b = a.copy()
    b[1, 0, 0, 0] = 0.5
    found = difference(a, b, [7, 8], SPEC)
    count = a.size
    assert found.max_abs == 1.0  # 0.5 in units of sigma_data = 0.5
    assert found.mean_abs == pytest.approx(1.0 / count)
    assert found.relative_l2 == pytest.approx(1.0)
    assert found.psnr_db == pytest.approx(10 * math.log10(2.0**2 / (0.25 / count)))
    assert found.uint8_mismatch == pytest.approx(1 / count)
    assert found.uint8_max_step == 191 - 128  # to_uint8 of 0.5 and of 0
    assert found.worst_seed == 8


def test_equal_samples_are_equal() -> None:
    a, _ = pair(0, 0)
    found = difference(a, a, range(4), SPEC)
    assert (found.max_abs, found.psnr_db, found.uint8_mismatch, found.uint8_max_step) == (0, math.inf, 0, 0)
    assert found.ssim == pytest.approx(1, abs=1e-12)
    assert found.to_dict()["psnr_db"] is None


@given(st.integers(0, 99), st.floats(1e-4, 1))
def test_differences_are_symmetric_and_ordered(seed: int, scale: float) -> None:
    a, b = pair(seed, scale)
    one, other = difference(a, b, range(4), SPEC), difference(b, a, range(4), SPEC)
    assert (one.max_abs, one.mean_abs, one.psnr_db) == (other.max_abs, other.mean_abs, other.psnr_db)
    assert one.ssim == pytest.approx(other.ssim, abs=1e-12)
    assert 0 < one.mean_abs <= one.max_abs
    assert one.ssim is not None and -1 <= one.ssim <= 1


def test_ssim_against_a_direct_transcription() -> None:
    """Wang et al. 2004, equation 13, one window at a time."""
    a, b = (x.astype(np.float64) for x in pair(3, 0.2, (2, 1, 14, 13)))
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for n in range(2):
        for y in range(14 - 10):
            for x in range(13 - 10):
                p, q = a[n, 0, y : y + 11, x : x + 11], b[n, 0, y : y + 11, x : x + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append(((2 * mp * mq + c1) * (2 * cov + c2)) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(a, b, 2.0) == pytest.approx(np.mean(values), abs=1e-12)
    assert ssim(a, b, 2.0) < 0.99


@pytest.mark.parametrize("side", [1, 2, 4, 8, 11])
def test_ssim_of_small_pictures(side: int) -> None:
    a, b = (x.astype(np.float64) for x in pair(1, 0.1, (2, 3, side, side)))
    assert ssim(a, a, 2.0) == pytest.approx(1)
    assert ssim(a, b, 2.0) < 1


def test_what_is_no_picture_has_no_picture_numbers() -> None:
    spec = msgspec.structs.replace(SPEC, output="latents", sample_shape=(4, 8))
    a, b = pair(0, 0.1, (2, 4, 8))
    found = difference(a, b, [0, 1], spec)
    assert (found.ssim, found.uint8_mismatch, found.uint8_max_step) == (None, None, None)
    assert found.max_abs > 0
    with pytest.raises(ShapeError, match=r"candidate is \(2, 4, 8\), reference \(1, 4, 8\), expected both"):
        difference(a, b[:1], [0, 1], spec)


def test_float64_counts_into_the_noise_floor(reference: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = reference.opened().backend
    noise, conditioning = make_request(backend.spec, num_images=3, seed=0).inputs(0, 3)
    exact = backend.sample_float64(noise, conditioning)  # type: ignore[attr-defined]
    gap = np.abs(exact - backend.sample(noise, conditioning)).max()
    assert exact.dtype == np.float64 and 0 < gap < 1e-4
    before = noise_floor(reference, seeds=range(8))
    monkeypatch.setattr(backend, "sample_float64", lambda n, c: backend.sample(n, c) + np.float64(0.5))
    assert before < 1e-3 and noise_floor(reference, seeds=range(8)) == pytest.approx(1.0, rel=1e-3)


def test_each_rung_is_also_held_against_the_one_below(ort: Generator, reference: Generator) -> None:
    run = run_reference(reference, seeds=range(6))
    first = compare(ort, run)
    second = compare(ort, run, below=first)
    assert first.step is None and first.rung == "" and first.overall.max_abs > 0
    assert second.rung == "onnx/fp32/2step/model.onnx on onnxruntime"
    assert second.step is not None and second.step.max_abs == 0, "the same graph twice"
    assert second.to_dict()["step"]["max_abs"] == 0 and "images" not in second.to_dict()


def test_validation_makes_as_many_seeds_as_the_largest_batch_needs(unet_copy: Path) -> None:
    """With 32 seeds asked for and a largest batch of 64, or two and five, the default must not refuse itself."""
    results = validate_bundle(unet_copy, precisions=["fp32"], num_seeds=2)
    assert all(results) and {each.num_samples for each in results} == {5}


def test_a_looser_least_psnr_needs_a_reason_wherever_it_is_asked(ort: Generator, reference: Generator) -> None:
    backend = ort.opened().backend
    with pytest.raises(
        ConfigError, match=r"min_psnr_db is 20\.0, looser than 35\.0 dB for any precision, expected a reason"
    ):
        compare(backend, reference, seeds=range(5), min_psnr_db=20)
    assert compare(backend, reference, seeds=range(5), min_psnr_db=20, reason="a test").reason == "a test"
    assert compare(backend, reference, seeds=range(5), min_psnr_db=60), "stricter needs none"
    with pytest.raises(ConfigError, match=r"looser than 60\.0 dB for fp16"):
        _check_least_psnr(45, "fp16")


def test_one_lost_sample_fails_what_the_mean_hides(ort: Generator, reference: Generator) -> None:
    backend = ort.opened().backend
    lost = ort(32, seed=0, output_type="raw").images[17]

    def alter(images: np.ndarray) -> np.ndarray:
        hit = (images == lost).all(axis=(1, 2, 3))
        moved: np.ndarray = images + np.float32(0.12) * hit.reshape(-1, 1, 1, 1)
        return moved

    parity = compare(Altered(backend, alter), reference.opened().backend, batches=(1,), min_psnr_db=38)
    assert parity.overall.psnr_db > 38 and parity.overall.worst_psnr_db == pytest.approx(24.4, abs=0.1)
    assert not parity and not parity.record().passed
    with pytest.raises(ParityError, match=r"worst sample 24\.4 dB\); expected .* of each sample 26\.0 dB"):
        parity.raise_if_failed()


def test_a_fault_fails_whatever_the_numbers(unet_copy: Path) -> None:
    results = validate_bundle(
        unet_copy, precisions=["fp32"], steps=[1], num_seeds=5, batches=[5], examine=lambda _: ("time, step 0", (99.0,))
    )
    (parity,) = results
    assert parity.numbers_pass and not parity
    with pytest.raises(ParityError, match="time, step 0; expected"):
        parity.raise_if_failed()
    (record,) = Bundle.open(unet_copy).manifest.parity
    assert (record.passed, record.fault, record.psnr_by_step) == (False, "time, step 0", (99.0,))
    assert record.finding == "time, step 0"
    with Generator.from_pretrained(unet_copy, num_inference_steps=1) as gen:
        assert gen(1, seed=0).info.backend == "torch", "auto does not take what is faulty"
