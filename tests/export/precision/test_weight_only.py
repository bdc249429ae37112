"""Weight-only INT8 and INT4: exact products by rounded weights, stored once; blank pictures are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

from torch import Tensor, nn  # noqa: E402

from helpers.sana_fixtures import TOKENS  # noqa: E402
from scm_sdk.errors import ConfigError, ParityError  # noqa: E402
from scm_sdk.export.cli import main  # noqa: E402
from scm_sdk.export.graph.io import read_model  # noqa: E402
from scm_sdk.export.graph.network import export_onnx  # noqa: E402
from scm_sdk.export.precision.int8 import Exclusion, QuantizePlan, default_quantize_plan  # noqa: E402
from scm_sdk.export.precision.probe import Probe  # noqa: E402
from scm_sdk.export.precision.weight_only import BITS, BLOCK, quantize_weights  # noqa: E402
from scm_sdk.inference.generator import Generator  # noqa: E402
from scm_sdk.inference.parity.difference import find_blank  # noqa: E402
from scm_sdk.model.consistency import ConsistencyModel  # noqa: E402


def dequantized(model: Any, name: str, bits: int) -> np.ndarray:
    """Return the weight (K, N) that codes, scales and zero points stand for, from the definition of the operator."""
    parts = ("codes" + str(bits), "scales", "zero_points")
    codes, scales, zeros = (
        np.asarray(model.graph.initializers[f"{name}.{part}"].const_value.numpy()) for part in parts
    )

    def unpacked(packed: np.ndarray) -> np.ndarray:
        if bits == 8:
            return packed.astype(np.float64)
        halves = np.stack([packed & 15, packed >> 4], axis=-1)  # the lower half first
        return halves.reshape(*packed.shape[:-1], -1).astype(np.float64)

    N, blocks = codes.shape[:2]
    values = unpacked(codes).reshape(N, blocks, BLOCK)
    shift = unpacked(zeros.reshape(N, -1))[:, :blocks, None]
    return ((values - shift) * scales.reshape(N, blocks, 1)).reshape(N, -1).T


@pytest.mark.parametrize("precision", BITS)
def test_images_are_those_of_the_rounded_weights(sana_image_bundle: Path, precision: str) -> None:
    """A float32 graph with the same rounded weights gives the same images: products and convolutions are exact."""
    bits = BITS[precision]
    path = sana_image_bundle / "onnx" / "fp32" / "1step" / "model.onnx"
    full = read_model(path)
    low = quantize_weights(full, default_quantize_plan(full), precision)
    rounded = full.clone()
    names = [name for name in full.graph.initializers if f"{name}.scales" in low.graph.initializers]
    assert len(names) > 8 and not set(names) & set(low.graph.initializers), "the originals are not stored, too"
    kinds = set()
    for name in names:
        value = rounded.graph.initializers[name]
        old = np.asarray(value.const_value.numpy())
        shape = old.shape if old.ndim == 2 else (old.shape[1], old.shape[0])
        matrix = dequantized(low, name, bits)[: shape[0]]
        step = np.abs(old).max() * 2 / (2**bits - 1)
        new = (matrix if old.ndim == 2 else matrix.T.reshape(old.shape)).astype(np.float32)
        assert 0 < np.abs(new - old).max() <= step
        value.const_value = ir.tensor(new, name=name)
        kinds.add(old.ndim)
    assert kinds == {2, 4}, "linear layers and pointwise convolutions"
    spec = Generator.from_pretrained(sana_image_bundle, backend="onnxruntime").opened(1).spec
    probe = Probe(rounded, spec, num_samples=3)
    np.testing.assert_allclose(probe.run(low), probe.images, rtol=0, atol=1e-4)
    assert np.abs(probe.run(full) - probe.images).max() > 1e-3, "the rounding must matter"


def test_steps_share_the_weights(sana_image_bundle: Path) -> None:
    stored = []
    for steps in (1, 2):
        full = read_model(sana_image_bundle / "onnx" / "fp32" / f"{steps}step" / "model.onnx")
        low = quantize_weights(full, default_quantize_plan(full), "int4")
        stored.append({name for name in low.graph.initializers if name.endswith(".codes4")})
    assert stored[0] == stored[1]


def test_the_command_adds_it_and_a_name_asks_for_it(sana_image_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(sana_image_bundle, tmp_path / "bundle"))
    run = CliRunner().invoke
    options = ["--to", "int8-weights", "--to", "int4", "--num-samples", "4"]
    made = run(main, ["quantize", str(bundle), *options])
    assert made.exit_code == 0 and "layers with 4-bit weights" in made.output, made.output
    again = run(main, ["quantize", str(bundle), *options])
    assert again.exit_code == 0 and "unchanged" in again.output
    told: dict[str, Any] = {
        "seed": 1, "output_type": "np", "prompt_embeds": np.ones((1, TOKENS, 8), np.float32), "num_inference_steps": 1,
    }  # fmt: skip
    found = {}
    for precision in ("fp32", "int8-weights", "int4"):
        with Generator.from_pretrained(bundle, backend="onnxruntime", precision=precision) as gen:
            found[precision] = gen(**told).images
            assert gen.opened().row.precision == precision
    gaps = [float(np.abs(found[precision] - found["fp32"]).mean()) for precision in ("int8-weights", "int4")]
    assert 0 < 4 * gaps[0] < gaps[1]
    with Generator.from_pretrained(bundle) as gen:
        assert gen.opened().row.precision not in BITS, "auto takes what was compared"
    judged = ["validate", str(bundle), "--backend", "onnxruntime", "--steps", "1", "--num-seeds", "3", "--json"]
    names = ["--precision", "int8-weights", "--precision", "int4", "--min-psnr", "15", "--reason", "a random network"]
    checked = run(main, [*judged, *names])
    assert checked.exit_code == 0, checked.output
    records = {row["candidate"]: row for row in json.loads(checked.stdout)["parity"]}
    assert len(records) == 2 and all(row["passed"] and not row["fault"] for row in records.values())


class Fragile(nn.Module):
    """Its one weight is far larger where its input is 0: in 4 bits the others vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(32))
            self.mix.weight[:, 0] = 1e4

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        keep = torch.ones(32, device=x.device)
        keep[0] = 0
        return self.mix(x * keep) + 0 * t[:, None]


def test_blank_pictures_are_refused(tmp_path: Path) -> None:
    model = ConsistencyModel(network=Fragile(), sample_shape=(32,)).eval()
    spec = model.spec(1)
    export_onnx(model, spec, tmp_path / "model.onnx")
    full = read_model(tmp_path / "model.onnx")
    probe = Probe(full, spec, num_samples=4)
    low = quantize_weights(full, QuantizePlan(), "int4")
    with pytest.raises(ParityError, match=r"int4, 1 steps: samples are blank.*Nothing was added"):
        probe.check_not_blank(low, "int4, 1 steps")
    probe.check_not_blank(full, "fp32, 1 steps")


def test_what_counts_as_blank() -> None:
    wanted = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    assert find_blank(wanted, wanted) == "" and find_blank(wanted * 0.8 + 0.1, wanted) == ""
    assert "samples are blank" in find_blank(wanted * 0.1, wanted)
    assert "samples are alike" in find_blank(np.repeat(wanted[:1], 6, axis=0), wanted)
    assert find_blank(np.zeros_like(wanted), np.zeros_like(wanted)) == "", "the reference is blank, too"


def test_a_plan_without_layers_is_refused(sana_image_bundle: Path) -> None:
    full = read_model(sana_image_bundle / "onnx" / "fp32" / "1step" / "model.onnx")
    plan = QuantizePlan(exclusions=(Exclusion(pattern="*", reason="all"),))
    with pytest.raises(ConfigError, match="leaves no layer for int4"):
        quantize_weights(full, plan, "int4")
