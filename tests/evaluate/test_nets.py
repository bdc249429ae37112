"""Feature networks by name, reference statistics as files, and what an evaluation refuses before it samples."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from scm_sdk._util.events import Silent
from scm_sdk.errors import ConfigError, IntegrityError
from scm_sdk.evaluate.quality import sampling
from scm_sdk.evaluate.quality.distances import feature_stats, frechet_distance
from scm_sdk.evaluate.quality.features import content_key, extract_features
from scm_sdk.evaluate.quality.held_out import load_held_out
from scm_sdk.evaluate.quality.nets import METRIC, FeatureNet, effnet_lite0, open_net
from scm_sdk.evaluate.quality.quality import evaluate_images
from scm_sdk.evaluate.quality.reference_stats import read_stats, write_stats
from scm_sdk.export.cli import main
from scm_sdk.spec import SamplerSpec, default_times

SPEC = SamplerSpec(times=default_times(1), sample_shape=(3, 16, 16))


class Inception(nn.Module):
    """Called as NVIDIA's file is, and as large at its end."""

    def __init__(self, dim: int = 2048) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, dim))

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8 and return_features
        return x.float().mean(dim=(1, 2, 3)).unsqueeze(1) * self.weight / 255


class Dino(nn.Module):
    """What it is given is what it returns, first."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 224, 224) and x.dtype == torch.float32
        return torch.cat([x.mean(dim=(2, 3)), torch.zeros(len(x), 1021)], dim=1)


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases deprecate it, each by another category
        torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("nets")
    return {
        "inception": script(Inception(), folder / "inception-2015-12-05.pt"),
        "other": script(Inception(64), folder / "other.pt"),
        "dino": script(Dino(), folder / "dino.pt"),
    }


def pictures(count: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_each_net_has_its_own_name(files: dict[str, Path]) -> None:
    inception, dino = open_net(f"inception-ts:{files['inception']}"), open_net(f"dinov2-ts:{files['dino']}")
    assert inception.metric(10_000) == "FID (inception-2015-12-05, N=10000)" and inception.dim == 2048
    assert dino.metric(64) == "FD-DINOv2 (N=64)" and open_net().metric(64) == METRIC == "FD-EffLite0@96"
    assert len({net.weights_sha256 for net in (inception, dino, open_net())}) == 3
    assert len({content_key(pictures(), net) for net in (inception, dino, open_net())}) == 3
    flat = np.full((2, 32, 32, 3), 255, np.uint8)
    assert extract_features(flat, net=inception)[0, [0, -1]].tolist() == [-1, 1]
    white = [(1 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    np.testing.assert_allclose(extract_features(flat, net=dino)[0, :3], white, rtol=1e-5)


def test_files_that_are_not_the_net(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"net is 'inception', expected one of effnet-lite0"):
        open_net("inception")
    with pytest.raises(ConfigError, match=r"is no file, expected the TorchScript .*inception-2015-12-05.pt"):
        open_net(f"inception-ts:{tmp_path / 'missing.pt'}")
    (tmp_path / "text.pt").write_text("weights", encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"is no TorchScript file: .*Expected that of inception-ts"):
        open_net(f"inception-ts:{tmp_path / 'text.pt'}")
    with pytest.raises(IntegrityError, match=r"gives \(2, 64\) for two pictures, expected \(2, 2048\)"):
        open_net(f"inception-ts:{files['other']}")
    with pytest.raises(IntegrityError, match="cannot be called as inception-ts is"):
        open_net(f"inception-ts:{files['dino']}")


def test_statistics_of_edm_and_of_our_own(files: dict[str, Path], tmp_path: Path) -> None:
    net = open_net(f"inception-ts:{files['inception']}")
    small = FeatureNet(name="small", title="FD", dim=3, weights_sha256="ab", forward=lambda x: x.float().mean((2, 3)))
    stats = feature_stats(extract_features(pictures(80, 1), net=small))
    write_stats(tmp_path / "ours.npz", stats, small, (16, 16, 3))
    read = read_stats(tmp_path / "ours.npz", small, (16, 16, 3))
    assert read.count == 80 and frechet_distance(read, stats) < 1e-9
    np.savez(tmp_path / "edm.npz", mu=stats.mean, sigma=stats.cov)
    assert read_stats(tmp_path / "edm.npz", small, (16, 16, 3)).count == 0
    quality = evaluate_images(pictures(), read, net=small)
    assert (quality.kid, quality.precision, quality.fd_floor, quality.num_reference) == (None, None, None, 80)
    measured = evaluate_images(pictures(), read, net=small, other_real=pictures(seed=2))
    assert measured.fd == quality.fd and measured.fd_floor_source == "measured"
    with pytest.raises(ConfigError, match="statistics describe no single one"):
        evaluate_images(pictures(), read, net=small, beside=pictures())
    with pytest.raises(ConfigError, match=r"net small, expected inception-ts"):
        read_stats(tmp_path / "ours.npz", net, (16, 16, 3))
    with pytest.raises(ConfigError, match=r"has weights_sha256 ab, expected cd"):
        read_stats(tmp_path / "ours.npz", FeatureNet(**{**vars(small), "weights_sha256": "cd"}), (16, 16, 3))
    with pytest.raises(ConfigError, match=r"has picture \(16, 16, 3\), expected \(32, 32, 3\)"):
        read_stats(tmp_path / "ours.npz", small, (32, 32, 3))
    with pytest.raises(ConfigError, match="has 3 dimensions, expected 2048, those of inception-ts"):
        read_stats(tmp_path / "edm.npz", net, (16, 16, 3))
    np.savez(tmp_path / "odd.npz", mu=stats.mean, sigma=np.arange(9.0).reshape(3, 3))
    with pytest.raises(IntegrityError, match="not finite and symmetric"):
        read_stats(tmp_path / "odd.npz", small, (16, 16, 3))
    np.savez(tmp_path / "none.npz", images=stats.mean)
    with pytest.raises(IntegrityError, match=r"holds \['images'\], expected mu"):
        read_stats(tmp_path / "none.npz", small, (16, 16, 3))
    (tmp_path / "text.npz").write_text("no archive", encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"is no readable .npz"):
        read_stats(tmp_path / "text.npz", small, (16, 16, 3))


ROWS: dict[str, Any] = {"source": "avatars", "reference_rows": (10_000, 10_100), "real_rows": (0, 100)}


@pytest.mark.parametrize(
    ("spec", "change", "text"),
    [
        ({"sample_shape": (3, 32, 32)}, {}, r"has pictures \(16, 16, 3\), expected \(32, 32, 3\)"),
        ({}, {"label": "hairColor"}, "this model has no labels"),
        ({}, {"real_rows": (0, 10_050)}, "overlap, expected disjoint"),
        ({}, {"real_rows": (0, 9)}, r"real rows \(--real-rows\) are 9, expected at least 64"),
        ({"num_classes": 2, "class_names": ("cat", "dog")}, {}, "the data's labels are blue, .* the model's cat, dog"),
        ({"num_classes": 2}, {}, "the model's 2"),
        ({"output": "latents"}, {}, "returns latents"),
    ],
)
def test_what_is_refused_before_sampling(spec: dict[str, Any], change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_held_out(msgspec.structs.replace(SPEC, **spec), effnet_lite0(), **(ROWS | change))


def test_labels_are_matched_by_name() -> None:
    """A model may have the data's classes in another order."""
    plain = load_held_out(SPEC, effnet_lite0(), **ROWS)
    assert plain.labels is None and plain.colors == ()
    names = load_names()
    straight = load_held_out(labeled(names), effnet_lite0(), **ROWS)
    turned = load_held_out(labeled(names[::-1]), effnet_lite0(), **ROWS)
    assert turned.colors == straight.colors[::-1] and straight.labels is not None and turned.labels is not None
    np.testing.assert_array_equal(turned.labels, len(names) - 1 - straight.labels)


def load_names() -> tuple[str, ...]:
    from scm_sdk.train.data.images import HAIR_NAMES

    return HAIR_NAMES


def labeled(names: tuple[str, ...]) -> SamplerSpec:
    return msgspec.structs.replace(SPEC, num_classes=len(names), class_names=names)


def test_a_run_that_was_cut_short_goes_on(unet_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 4)

    def sample(count: int, **options: Any) -> sampling.Samples:
        return sampling.sample_student(
            unet_bundle, count, num_inference_steps=1, backend="onnxruntime", cache=tmp_path, **options
        )

    class Interrupting(Silent):
        def step(self, text: str, done: int, total: int, /) -> None:
            if done == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(10, events=Interrupting())
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 2, "two whole blocks"
    whole = sample(10)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()) and len(list(tmp_path.iterdir())) == 3
    alone = sampling.sample_student(unet_bundle, 10, num_inference_steps=1, backend="onnxruntime")
    np.testing.assert_array_equal(whole.images, alone.images)
    other = sampling.sample_student(unet_bundle, 4, num_inference_steps=2, backend="onnxruntime", cache=tmp_path)
    assert (other.images != whole.images[:4]).any() and len(list(tmp_path.iterdir())) == 4, "other steps, other blocks"
    next(iter(kept)).write_bytes(b"damaged")
    with pytest.raises(IntegrityError, match="not a readable cache of pictures"):
        sample(10)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--teacher-steps", "18", "--precision", "fp16"], "a teacher runs in PyTorch"),
        (
            ["--ref", "x.npz", "--precision", "fp32", "--precision", "fp16", "--max-kid-delta", "1"],
            "holds statistics",
        ),
        (["--precision", "int8", "--data", "avatars"], "pictures (16, 16, 3), expected (8, 8, 3)"),
        (["--feature-net", "fid"], "feature net is 'fid'"),
    ],
)
def test_the_verb_refuses_first(arguments: list[str], text: str, unet_bundle: Path) -> None:
    run = CliRunner().invoke(main, ["evaluate", str(unet_bundle), *arguments])
    assert run.exit_code == 2 and text in " ".join(run.stderr.split()), run.output


def test_the_verb_with_statistics_keeps_its_scores(unet_copy: Path, files: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", images=np.random.default_rng(0).integers(0, 256, (140, 8, 8, 3), dtype=np.uint8))
    common = ["evaluate", str(unet_copy), "--data", str(tmp_path / "real.npz"), "--rows", "0", "70", "--real-rows"]
    common += ["70", "140", "--num-images", "64", "--steps", "1", "--backend", "onnxruntime", "--label", ""]
    common += ["--feature-net", f"inception-ts:{files['inception']}", "--cache", str(tmp_path / "cache")]
    first = CliRunner().invoke(main, [*common, "--save-ref", str(tmp_path / "ref.npz"), "--json"])
    assert first.exit_code == 0, first.output
    again = [*common, "--ref", str(tmp_path / "ref.npz"), "-o", str(tmp_path / "scores.json"), "--keep"]
    done = CliRunner().invoke(main, again)
    assert done.exit_code == 0 and "FID" in done.stdout, done.output
    (held,), (kept,) = json.loads(first.stdout), json.loads((unet_copy / "reports/quality.json").read_text("utf-8"))
    assert json.loads((tmp_path / "scores.json").read_text("utf-8")) == [kept]
    assert kept["quality"]["metric"] == "FID (inception-2015-12-05, N=64)"
    assert kept["quality"]["fd"] == pytest.approx(held["quality"]["fd"], rel=1e-6) and kept["quality"]["kid"] is None
