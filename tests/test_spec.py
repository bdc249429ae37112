"""``SamplerSpec``: what export and inference share, checked when it is made and when it is read."""

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scm_sdk.errors import ConfigError
from scm_sdk.spec import MAX_STEPS, SamplerSpec, TensorSpec, default_times

NAMES = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=5)


@st.composite
def specs(draw: st.DrawFn) -> SamplerSpec:
    """Any spec that keeps the contract."""
    times = draw(st.sets(st.floats(1e-3, math.pi / 2), min_size=1, max_size=6))
    names = draw(st.lists(NAMES, unique=True, max_size=4))
    low = draw(st.floats(-10, 10))
    return SamplerSpec(
        times=tuple(sorted(times, reverse=True)),
        sample_shape=tuple(draw(st.lists(st.integers(1, 64), min_size=1, max_size=4))),
        sigma_data=draw(st.floats(1e-3, 100)),
        output=draw(st.sampled_from(["pixels", "latents"])),
        output_shape=tuple(draw(st.lists(st.integers(1, 64), max_size=3))),
        value_range=(low, low + draw(st.floats(0.1, 10))),
        num_classes=len(names),
        class_names=tuple(names),
        guidance_range=draw(st.none() | st.just((1.0, 8.0))),
        conditioning=draw(st.just(()) | st.just((TensorSpec(name="prompt", shape=(77, 32)),))),
        max_batch=draw(st.integers(1, 512)),
    )


def make(**changes: Any) -> SamplerSpec:
    return SamplerSpec(**({"times": (1.5, 1.1), "sample_shape": (3, 16, 16)} | changes))


@given(specs())
def test_json_gives_back_an_equal_spec(spec: SamplerSpec) -> None:
    assert SamplerSpec.from_json(spec.to_json()) == spec
    assert SamplerSpec.from_json(json.dumps(json.loads(spec.to_json()), indent=1).encode()) == spec


@given(specs())
def test_inputs_are_noise_first_then_conditioning(spec: SamplerSpec) -> None:
    names = [tensor.name for tensor in spec.inputs]
    steps = spec.num_inference_steps
    assert names[:steps] == [f"noise_{i}" for i in range(steps)]
    assert len(set(names)) == len(names)
    assert all(tensor.shape == spec.sample_shape for tensor in spec.noise_inputs)
    assert ("class_labels" in names) == (spec.num_classes > 0)
    assert ("guidance_scale" in names) == (spec.guidance_range is not None)
    assert [t.dtype for t in spec.inputs if t.name == "class_labels"] == ["int64"] * (spec.num_classes > 0)
    assert spec.image_shape == (spec.output_shape or spec.sample_shape)


@given(st.integers(1, MAX_STEPS), st.floats(1e-2, 100))
def test_default_times_make_a_spec(steps: int, sigma_data: float) -> None:
    times = default_times(steps, sigma_data=sigma_data)
    assert len(times) == steps
    if steps != 2 or times[0] > 1.1:  # data as wide as the noise leaves no room above t_mid
        assert make(times=times).num_inference_steps == steps
    assert math.isclose(math.tan(times[0]) * sigma_data, 80, rel_tol=1e-6)


def test_the_papers_times() -> None:
    assert default_times(1) == (math.atan(160),)
    assert default_times(2) == (math.atan(160), 1.1)
    assert make().with_steps(1).times == (math.atan(160),)
    assert make(max_time=1.5708, mid_time=1.3).with_steps(2).times == (1.5708, 1.3)
    assert make(max_time=1.5).with_steps(3).times == (1.5, 1.0, 0.5)
    for steps in (0, -1, MAX_STEPS + 1):
        with pytest.raises(ConfigError, match=f"num_inference_steps is {steps}, expected 1..64"):
            default_times(steps)


def test_sanas_first_time_is_allowed() -> None:
    assert make(times=(1.57080, 1.3)).times[0] > math.pi / 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"times": ()}, r"times holds 0 entries, expected 1\.\.64"),
        ({"times": (1.5, 0.0)}, r"expected radians in \(0, pi/2\].*atan"),
        ({"times": (80.0,)}, r"expected radians in \(0, pi/2\]"),
        ({"times": (math.nan,)}, r"expected radians in \(0, pi/2\]"),
        ({"times": (1.1, 1.5)}, "expected to fall strictly"),
        ({"times": (1.1, 1.1)}, "expected to fall strictly"),
        ({"sigma_data": 0.0}, "sigma_data is 0.0, expected a number greater than 0"),
        ({"sigma_data": math.nan}, "sigma_data is nan"),
        ({"sample_shape": ()}, "expected at least one axis"),
        ({"sample_shape": (3, 0)}, "sample_shape is .* all >= 1"),
        ({"output_shape": (0,)}, "output_shape is .*expected axes >= 1"),
        ({"value_range": (1.0, -1.0)}, "value_range is .*expected .lowest, highest"),
        ({"num_classes": -1}, "num_classes is -1, expected 0"),
        ({"num_classes": 2, "class_names": ("a",)}, "class_names holds 1 names, expected num_classes = 2"),
        ({"num_classes": 2, "class_names": ("a", "a")}, "class_names holds a name twice"),
        ({"guidance_range": (2.0, 1.0)}, "guidance_range is"),
        ({"guidance_range": (1.0, 2.0), "default_guidance": 3.0}, "default_guidance is 3.0, expected a number in"),
        ({"default_guidance": 3.0}, "default_guidance is 3.0"),
        ({"max_time": 2.0}, "max_time is 2.0, expected radians"),
        ({"conditioning": (TensorSpec(name="noise_1"),)}, "noise_1, noise_1, expected each name once"),
        ({"max_batch": 0}, "max_batch is 0, expected 1 or more"),
        ({"noise_contract": "scm-noise-v2"}, "made by a newer scm-sdk; update"),
    ],
)
def test_broken_contracts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_json_of_a_broken_contract_is_refused_like_the_value() -> None:
    text = make().to_json().replace("1.5", "9.5")
    with pytest.raises(ConfigError, match="expected radians"):
        SamplerSpec.from_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", '{"times": [1.5]}', '{"times": "x", "sample_shape": [1]}', "{" * 100_000,
        '{"a":' * 100_000, b"\xff", b'{"output": "\xff"}',
        make().to_json()[:-1] + ', "color": 1}', make().to_json()[:-1],
    ],
)  # fmt: skip
def test_other_text_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"sampler spec cannot be read: .*Expected the JSON that scm-export wrote"):
        SamplerSpec.from_json(text)


@given(st.binary(max_size=60) | specs().map(lambda s: s.to_json().encode()), st.data())
def test_any_bytes_give_a_spec_or_a_config_error(data: bytes, choice: st.DataObject) -> None:
    cut = choice.draw(st.integers(0, len(data)))
    junk = choice.draw(st.binary(max_size=3))
    for text in (data, data[:cut] + junk + data[cut + len(junk) :]):
        try:
            spec = SamplerSpec.from_json(text)
        except ConfigError:
            continue
        assert SamplerSpec.from_json(spec.to_json()) == spec


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        make().max_batch = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match="max_batch is 0"):
        msgspec.structs.replace(make(), max_batch=0)
