"""The C++ example is built from the library alone, and computes the recorded samples from a seed."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scm_sdk.bundle.bundle import Bundle
from scm_sdk.inference.generator import Generator
from scm_sdk.noise import standard_normal

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)


def onnxruntime_library() -> Path:
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None and spec.submodule_search_locations
    found = sorted(Path(spec.submodule_search_locations[0], "capi").glob("libonnxruntime.*"))
    found = [path for path in found if "providers" not in path.name]
    if not found:
        pytest.skip("this onnxruntime wheel has no library of its own")
    return found[0]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    configure = ["cmake", "-S", ROOT / "examples" / "cpp", "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    for command in (
        [*configure, f"-DONNXRUNTIME_LIBRARY={onnxruntime_library()}"],
        ["cmake", "--build", folder],
    ):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "scm_generate"


def run(program: Path, *arguments: object, code: int = 0) -> str:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, encoding="utf-8", timeout=1800)
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.mark.parametrize("steps", [1, 2])
def test_it_computes_the_recorded_samples(program: Path, unet_bundle: Path, tmp_path: Path, steps: int) -> None:
    golden = Bundle.open(unet_bundle).goldens()[steps]
    assert golden.class_labels is not None
    for image, seed, label in zip(golden.images, golden.seeds, golden.class_labels, strict=True):
        run(program, unet_bundle, "--steps", steps, "--seed", seed, "--label", label, "--raw", tmp_path / "raw")
        found = np.fromfile(tmp_path / "raw", "<f4").reshape(image.shape)
        np.testing.assert_allclose(found, image, rtol=0, atol=5e-5)


@pytest.mark.parametrize("seed", [0, 1234, 2**32, 2**64 - 1])
def test_it_gives_the_bits_and_the_pixels_of_the_python_package(
    program: Path, unet_bundle: Path, ort: Generator, tmp_path: Path, seed: int
) -> None:
    """The same library on the same noise: were one bit of the noise another, so were the image."""
    arguments = [unet_bundle, "--seed", seed, "--label", 2, "--threads", 1]
    run(program, *arguments, "--raw", tmp_path / "raw", "-o", tmp_path / "image.ppm")
    asked = {"seed": [seed], "class_labels": [2], "num_inference_steps": 2}
    raw = ort(1, output_type="raw", **asked).images[0]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "raw", "<f4").reshape(raw.shape), raw)
    (picture,) = ort(1, **asked).images
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "image.ppm")), np.asarray(picture))


NOISE = """
#include <cstdio>
#include "noise.hpp"
int main() {
  for (const auto seed : {std::uint64_t{0}, std::uint64_t{7}, std::uint64_t{1} << 32, ~std::uint64_t{0}})
    for (std::uint32_t step : {0u, 1u, 63u}) {
      const auto noise = scm::standard_normal(seed, step, 4099);
      std::fwrite(noise.data(), sizeof(float), noise.size(), stdout);
    }
}
"""


def test_the_noise_is_the_same_to_the_bit(tmp_path: Path) -> None:
    (tmp_path / "noise.cpp").write_text(NOISE, encoding="utf-8")
    compile_ = [
        "c++",
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        f"-I{ROOT / 'examples' / 'cpp'}",
        "noise.cpp",
        "-o",
        "n",
    ]
    subprocess.run(compile_, cwd=tmp_path, check=True, timeout=1800)
    found = np.frombuffer(subprocess.run([tmp_path / "n"], capture_output=True, check=True).stdout, "<f4")
    wanted = [standard_normal(seed, step, (4099,)) for seed in (0, 7, 2**32, 2**64 - 1) for step in (0, 1, 63)]
    np.testing.assert_array_equal(found.reshape(len(wanted), 4099), wanted)


def test_what_is_wrong_is_said(program: Path, unet_bundle: Path, tmp_path: Path) -> None:
    out = ["--raw", tmp_path / "raw"]
    assert "usage: scm_generate BUNDLE" in run(program, code=1)
    assert "--seed is 7x, expected a whole number" in run(program, unet_bundle, "--seed", "7x", *out, code=1)
    assert "--label is 4, the model has 4 labels" in run(program, unet_bundle, "--label", 4, *out, code=1)
    assert "has no fp32 graph of 3 steps" in run(program, unet_bundle, "--steps", 3, *out, code=1)
    assert "scm_manifest.json cannot be read" in run(program, tmp_path, *out, code=1)
    assert "--steps is 4294967298, expected" in run(program, unet_bundle, "--steps", 2**32 + 2, *out, code=1)
    assert "--seed has no value" in run(program, unet_bundle, *out, "--seed", code=1)
    assert run(program, "--help") == ""
    bundle = Path(shutil.copytree(unet_bundle, tmp_path / "bundle"))
    manifest = bundle / "scm_manifest.json"
    told = json.loads(manifest.read_text("utf-8"))
    for change, fact in [
        ({"sample_shape": [100000, 100000, 100]}, "numbers, expected at most 2^28"),
        ({"sample_shape": [-1, 8, 8]}, "the number -1 where"),
        ({"sample_shape": []}, "expected at most 2^28"),
        ({"num_classes": 1e300}, "the number 1e+300 where"),
        ({"value_range": [1, 1]}, "no value_range of two rising numbers"),
        ({"value_range": []}, "no value_range of two rising numbers"),
        ({"times": [0.5] * 3}, "no sampler of 2 steps"),
    ]:
        samplers = [each | (change if len(each["times"]) == 2 else {}) for each in told["samplers"]]
        manifest.write_text(json.dumps(told | {"samplers": samplers}), encoding="utf-8")
        assert fact in run(program, bundle, *out, code=1), change
    manifest.write_text(json.dumps(told), encoding="utf-8")
    graph = bundle / "onnx/fp32/2step/model.onnx"
    content = bytearray(graph.read_bytes())
    content[1000] ^= 1
    graph.write_bytes(content)
    assert "onnx/fp32/2step/model.onnx has sha256" in run(program, bundle, *out, code=1)
    graph.write_bytes(content[:1000])
    assert "expected" in run(program, bundle, *out, code=1)
    for damaged in (manifest.read_text("utf-8")[:-400], "[" * 100_000, "{"):
        manifest.write_text(damaged, encoding="utf-8")
        assert "the manifest is no JSON" in run(program, bundle, *out, code=1)
    assert not (tmp_path / "raw").exists()
