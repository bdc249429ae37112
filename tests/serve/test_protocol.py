"""Requests of the Open Inference Protocol as bytes: what is read, and that damage is refused by name."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scm_sdk.serve.inference_protocol import asked_outputs, decode, describe, encode
from scm_sdk.serve.schemas import RequestError
from scm_sdk.spec import SamplerSpec, TensorSpec, default_times

SPEC = SamplerSpec(
    times=default_times(1),
    sample_shape=(3, 4, 4),
    num_classes=3,
    guidance_range=(0.0, 4.0),
    conditioning=(TensorSpec(name="prompt_embeds", shape=(2, 2)),),
)
KNOWN = describe("m", "scm_onnxruntime", SPEC)


def tensor(name: str, datatype: str, data: list, **changes: object) -> dict:
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": data} | changes


def test_metadata_lists_what_the_model_takes() -> None:
    assert [t.name for t in KNOWN.inputs] == ["seed", "class_labels", "guidance_scale", "prompt"]
    assert {t.name: t.shape for t in KNOWN.outputs} == {
        "images": [-1, 4, 4, 3], "samples": [-1, 3, 4, 4], "seed": [-1], "class_labels": [-1],
    }  # fmt: skip
    latent = describe("m", "p", SamplerSpec(times=default_times(1), sample_shape=(7,), output="latents"))
    assert [t.name for t in latent.outputs] == ["samples", "seed"]
    assert asked_outputs(
        decode(b'{"inputs":[{"name":"seed","datatype":"UINT64","shape":[1],"data":[1]}]}', None, latent)[0], latent
    ) == {"samples": False, "seed": False}


def test_texts_and_numbers_are_read_from_json_and_from_bytes() -> None:
    as_json = [
        tensor("seed", "UINT64", [1, 2**64 - 1]), tensor("guidance_scale", "FP32", [1, 2.5]),
        tensor("prompt", "BYTES", ["a", "ü"]),
    ]  # fmt: skip
    _, found = decode(json.dumps({"inputs": as_json}).encode(), None, KNOWN)
    parts = [np.array([1, 2**64 - 1], "<u8").tobytes(), np.array([1, 2.5], "<f4").tobytes()]
    parts.append(b"\1\0\0\0a\2\0\0\0" + "ü".encode())
    head = [
        {k: v for k, v in each.items() if k != "data"} | {"parameters": {"binary_data_size": len(part)}}
        for each, part in zip(as_json, parts, strict=True)
    ]
    text = json.dumps({"inputs": head}).encode()
    _, again = decode(text + b"".join(parts), str(len(text)), KNOWN)
    for both in (found, again):
        assert both["seed"].tolist() == [1, 2**64 - 1]
        assert both["guidance_scale"].tolist() == [1, 2.5]
        assert both["prompt"] == ["a", "ü"]


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ([], "same number of each"),
        ([tensor("noise", "FP32", [1])], "'noise'"),
        ([tensor("seed", "UINT64", [1]), tensor("seed", "UINT64", [1])], "at most once"),
        ([tensor("seed", "INT64", [1])], "INT64"),
        ([tensor("seed", "UINT64", [])], r"\[0\]"),
        ([tensor("seed", "UINT64", [1], shape=[1, 1])], r"\[1, 1\]"),
        ([tensor("seed", "UINT64", [1], shape=[2])], "1 values, expected 2"),
        ([tensor("seed", "UINT64", [-1])], "larger number"),
        ([tensor("seed", "UINT64", [2**64])], "larger number"),
        ([tensor("seed", "UINT64", [1.5])], "other values"),
        ([tensor("seed", "UINT64", [True])], "other values"),
        ([tensor("seed", "UINT64", [[1]])], "other values"),
        ([tensor("prompt", "BYTES", [1])], "other values"),
        ([tensor("seed", "UINT64", [1, 2]), tensor("class_labels", "INT64", [1])], "same number of each"),
        ([tensor("seed", "UINT64", [1], parameters={"binary_data_size": 9})], "binary_data_size"),
        ([tensor("seed", "UINT64", [1], parameters={"binary_data_size": True})], "binary_data_size"),
        ([tensor("seed", "UINT64", [1], parameters={"binary_data_size": 0})], "0 bytes"),
    ],
)
def test_wrong_inputs_are_refused_by_name(inputs: list, found: str) -> None:
    with pytest.raises(RequestError, match=found):
        decode(json.dumps({"inputs": inputs}).encode(), None, KNOWN)


@given(
    st.binary(max_size=80),
    st.sampled_from(["seed", "prompt", "guidance_scale"]),
    st.integers(-5, 90),
    st.integers(-1, 2**64),
    st.text(max_size=6),
)
def test_random_bytes_are_read_or_refused(data: bytes, name: str, size: int, count: int, more: str) -> None:
    kind = {"seed": "UINT64", "prompt": "BYTES", "guidance_scale": "FP32"}[name]
    head = {"name": name, "datatype": kind, "shape": [count], "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [head]}).encode()
    for body, length in ((text + data, str(len(text))), (data, str(size)), (text + data, more), (data, None)):
        try:
            _, found = decode(body, length, KNOWN)
        except RequestError:
            continue
        assert len(found[name]) == count >= 1


def test_answers_are_what_was_asked_for() -> None:
    arrays = {"images": np.zeros((2, 4, 4, 3), np.uint8), "seed": np.array([1, 2], np.uint64)}
    body, length = encode("m", "7", arrays, {"images": True, "seed": False})
    assert length is not None
    head = json.loads(body[:length])
    assert head["id"] == "7" and head["outputs"][1]["data"] == [1, 2]
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 96} and len(body) == length + 96
    body, length = encode("m", "", {"seed": arrays["seed"]}, {"seed": False})
    assert length is None and "id" not in json.loads(body)
