"""``scm.js`` in Node: the bundle's recorded samples, the levels of pictures, and what is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.node import run_node
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.export.edge.site import SITE_NAME, read_site, write_site
from scm_sdk.images import to_uint8
from scm_sdk.inference.generator import Generator
from scm_sdk.inference.parity.difference import difference

PROVE = """
const { Generator } = await import(`${args[0]}/scm.js`);
const gen = await Generator.load(`${args[0]}/`);
const proofs = await gen.prove();
done({ info: gen.info, proofs: proofs.map(({ samples, golden, difference, ...rest }) => ({
  ...rest, difference, steps: samples.info.steps, precision: samples.info.precision,
  images: Array.from(samples.images), seeds: samples.seeds.map(Number), labels: samples.classLabels,
})) });
"""
CALL = """
const scm = await import(`${args[0]}/scm.js`);
const calls = args[1];
const found = [];
for (const [load, request] of calls) {
  try {
    const gen = await scm.Generator.load(`${args[0]}/`, load);
    const samples = await gen.generate(request);
    found.push({ seeds: samples.seeds.map(String), labels: samples.classLabels, images: Array.from(samples.images) });
    await gen.close();
  } catch (error) {
    found.push({ error: `${error.name} ${error.code}: ${error.message}` });
  }
}
done(found);
"""


def call(site: Path, *calls: tuple[dict[str, Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Load the site and generate, once for each pair of options and request."""
    found: list[dict[str, Any]] = run_node(CALL, site.as_uri(), calls)
    return found


def test_the_shipped_model_makes_its_recorded_samples(
    avatars_bundle: Path, onnxruntime_web: Path, tmp_path: Path
) -> None:
    write_site(avatars_bundle, tmp_path / "site", devices=["wasm"], onnxruntime_web=onnxruntime_web)
    told = run_node(PROVE, (tmp_path / "site").as_uri())
    (proof,) = told["proofs"]
    golden, spec = Bundle.open(avatars_bundle).goldens()[2], Bundle.open(avatars_bundle).spec(2)
    images = np.array(proof["images"], np.float32).reshape(golden.images.shape)
    here = difference(images, golden.images, golden.seeds.tolist(), spec)
    assert proof["passed"] and 0 < here.max_abs <= proof["threshold"] and here.psnr_db > 110
    assert proof["difference"]["maxAbs"] == pytest.approx(here.max_abs, rel=1e-12)
    assert proof["difference"]["meanAbs"] == pytest.approx(here.mean_abs, rel=1e-9)
    assert proof["difference"]["psnrDb"] == pytest.approx(here.psnr_db, abs=1e-9)
    assert proof["difference"]["worstPsnrDb"] == pytest.approx(here.worst_psnr_db, abs=1e-9)
    info = told["info"]
    assert (info["device"], info["threads"]) == ("wasm", 1) and info["deviceReason"]
    assert info["graphs"][0]["sha256"] == Bundle.open(avatars_bundle).manifest.files[
        [entry.path for entry in Bundle.open(avatars_bundle).manifest.files].index("onnx/fp32/2step/model.onnx")
    ].sha256  # fmt: skip


def test_every_graph_makes_its_recorded_samples(site: Path) -> None:
    told = run_node(PROVE, site.as_uri())
    assert {(p["precision"], p["steps"], p["passed"]) for p in told["proofs"]} == {
        (precision, steps, True) for precision in ("fp32", "fp16") for steps in (1, 2)
    }


def test_a_golden_that_is_not_the_models_fails_the_proof(site_copy: Path) -> None:
    """The proof can fail: other samples are recorded, with their hash."""
    import hashlib

    path = site_copy / "goldens" / "1step.f32"
    images = np.frombuffer(path.read_bytes(), "<f4").copy()
    images[5] += 0.01
    path.write_bytes(images.tobytes())
    manifest = json.loads((site_copy / SITE_NAME).read_text("utf-8"))
    entry = next(each for each in manifest["files"] if each["path"] == "goldens/1step.f32")
    entry["sha256"] = hashlib.sha256(images.tobytes()).hexdigest()
    (site_copy / SITE_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    proofs = run_node(PROVE, site_copy.as_uri())["proofs"]
    assert {(p["precision"], p["steps"]): p["passed"] for p in proofs} == {
        ("fp32", 1): False, ("fp32", 2): True, ("fp16", 1): True, ("fp16", 2): True,
    }  # fmt: skip
    broken = next(p for p in proofs if not p["passed"])
    assert broken["difference"]["maxAbs"] == pytest.approx(0.01 / 0.5, rel=1e-2)


def test_requests_mean_what_they_mean_in_python(site: Path, two_precisions: Path) -> None:
    """Seeds, drawn labels, names and batches: the same images as the Python generator, within the fp32 bound."""
    requests: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"seed": "18446744073709551613", "numImages": 3, "steps": 1}),
        ({}, {"seeds": [5, 6, 7, 8, 9], "classLabels": ["cat", 1, "robot", 3, "cat"], "batchSize": 2}),
        ({}, {"seed": 3, "numImages": 5, "classLabels": "rocket", "batchSize": 5}),
    ]
    found = call(site, *requests)
    arguments: list[dict[str, Any]] = [
        {"num_images": 3, "seed": 2**64 - 3, "num_inference_steps": 1},
        {"num_images": 5, "seed": [5, 6, 7, 8, 9], "class_labels": ["cat", 1, "robot", 3, "cat"]},
        {"num_images": 5, "seed": 3, "class_labels": "rocket"},
    ]
    with Generator.from_pretrained(two_precisions, backend="onnxruntime", precision="fp32") as gen:
        for got, asked in zip(found, arguments, strict=True):
            expected = gen(output_type="raw", **asked)
            assert got["seeds"] == list(map(str, expected.seeds)) and got["labels"] == list(expected.class_labels or ())
            images = np.array(got["images"], np.float32).reshape(expected.images.shape)
            bound = min(graph.bound.threshold for graph in read_site(site).graphs if graph.bound.gate == "max_abs")
            assert np.abs(images - expected.images).max() <= bound * 0.5


def test_pictures_have_the_levels_of_python_and_name_what_made_them() -> None:
    """Every kind of value: below, above, at half levels, gray and color; a grid of three, enlarged."""
    from PIL import Image

    rng = np.random.default_rng(0)
    script = """
    import { toPng } from "./scm.js";
    const [images, shape, valueRange] = args;
    const info = { buildId: "b", steps: 2, precision: "fp32", backend: "onnxruntime-web wasm" };
    const samples = { images: Float32Array.from(images), shape, valueRange,
      seeds: [7n, 8n, 18446744073709551615n], classLabels: [0, 1, 2], info };
    const files = [await toPng(samples, { indices: [1] }), await toPng(samples, { columns: 2, scale: 3 })];
    done(await Promise.all(files.map(async (file) => Buffer.from(await file.arrayBuffer()).toString("hex"))));
    """
    for channels, (low, high) in [(1, (-1.0, 1.0)), (3, (-1.0, 1.0)), (3, (0.0, 255.0))]:
        images = rng.normal((low + high) / 2, 0.4 * (high - low), (3, channels, 5, 4)).astype(np.float32)
        images[1, 0] = (low + (np.arange(20) + 0.5) / 255 * (high - low)).reshape(5, 4)
        one, grid = (bytes.fromhex(t) for t in run_node(script, images.ravel().tolist(), images.shape, (low, high)))
        expected = to_uint8(images, (low, high))
        with Image.open(io.BytesIO(one)) as picture:
            got = np.asarray(picture).reshape(5, 4, channels)
            np.testing.assert_array_equal(got, expected[1])
            told = json.loads(picture.text["scm"])  # type: ignore[attr-defined]
        assert told == {
            "build_id": "b", "seeds": ["8"], "class_labels": [1], "num_inference_steps": 2, "precision": "fp32",
            "backend": "onnxruntime-web wasm",
        }  # fmt: skip
        with Image.open(io.BytesIO(grid)) as picture:
            sheet = np.asarray(picture).reshape(30, 24, channels)
            assert json.loads(picture.text["scm"])["seeds"] == ["7", "8", "18446744073709551615"]  # type: ignore[attr-defined]
        large = expected.repeat(3, axis=1).repeat(3, axis=2)
        np.testing.assert_array_equal(sheet[:15, :12], large[0])
        np.testing.assert_array_equal(sheet[15:, :12], large[2])
        assert (sheet[15:, 12:] == 255).all()


def test_wrong_requests_are_refused_by_name(site: Path) -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"classLabels": "dgo"}, 'class label is "dgo"', "cat, dog, robot, rocket"),
        ({"classLabels": 4}, "class label is 4", "expected 0 to 3"),
        ({"classLabels": [0, 1], "numImages": 3}, "2 labels for 3 images", "one for each"),
        ({"seed": -1}, "seed is -1", "0 <= seed"),
        ({"seed": "18446744073709551615", "numImages": 2}, "seed is 18446744073709551616", "0 <= seed"),
        ({"seeds": []}, "seeds holds 0", "expected 1 to"),
        ({"seeds": [1], "numImages": 1}, "seeds is given with seed or numImages", "seeds alone"),
        ({"numImages": 0}, "numImages is 0", "expected a whole number from 1"),
        ({"steps": 3}, "steps is 3", "expected one of 1, 2"),
        ({"precision": "int8"}, 'precision is "int8"', "fp32, fp16"),
        ({"batchSize": 6}, "batchSize is 6", "from 1 to 5"),
        ({"guidanceScale": 2}, "guidanceScale is given", "Leave it out"),
        ({"conditioning": {"prompt": 1}}, 'conditioning holds "prompt"', "expected: none"),
    ]
    found = call(site, *(({}, request) for request, *_ in wrong))
    for (request, *facts), got in zip(wrong, found, strict=True):
        assert got.get("error", "").startswith("ScmError bad-argument"), request
        assert all(fact in got["error"] for fact in facts), got


def test_wrong_options_are_refused_by_name(site: Path) -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"device": "gpu"}, "bad-argument", 'device is "gpu"'),
        ({"device": "webgpu"}, "no-webgpu", "Take device wasm"),
        ({"threads": 0}, "bad-argument", "threads is 0"),
        ({"threads": 2}, "no-threads", "no threads in Node"),
        ({"manifestSha256": "0" * 64}, "integrity", f"{SITE_NAME} has sha256"),
    ]
    found = call(site, *((options, {}) for options, *_ in wrong))
    for (options, code, fact), got in zip(wrong, found, strict=True):
        assert got.get("error", "").startswith(f"ScmError {code}: ") and fact in got["error"], (options, got)


def changed(text: str, name: str, value: object) -> bytes:
    """Return a manifest with another value under a name."""
    return json.dumps(json.loads(text) | {name: value}).encode()


def test_damaged_sites_are_refused_before_use(site_copy: Path) -> None:
    model = site_copy / "model/onnx/fp32/1step/model.onnx"
    whole, request = model.read_bytes(), ({}, {"steps": 1})
    binary = site_copy / "runtime/ort-wasm-simd-threaded.wasm.gz"
    manifest = site_copy / SITE_NAME
    text = manifest.read_text("utf-8")

    def refused(path: Path, damaged: bytes) -> str:
        before = path.read_bytes()
        path.write_bytes(damaged)
        (found,) = call(site_copy, request)
        path.write_bytes(before)
        return str(found.get("error"))

    cases = [
        (model, whole[:-1], "integrity", f"has {len(whole) - 1} bytes, expected {len(whole)}"),
        (model, whole[:-1] + bytes([whole[-1] ^ 1]), "integrity", "changed or damaged"),
        (model, b"", "integrity", "has 0 bytes"),
        (binary, binary.read_bytes()[:1000], "integrity", "cannot be unpacked"),
        (binary, b"\0" * 9, "integrity", "has 9 bytes"),
        (manifest, b"{", "manifest", "is no JSON"),
        (manifest, text.replace('"schema_version": 1', '"schema_version": 2').encode(), "manifest", "version 2"),
        (manifest, text.replace("scm-noise-v1", "scm-noise-v2").encode(), "manifest", "scm-noise-v2"),
        (manifest, text.replace('"samplers"', '"others"').encode(), "manifest", "samplers is no list"),
        (manifest, changed(text, "graphs", []), "manifest", "graphs is empty"),
        (manifest, changed(text, "files", [None]), "manifest", "files[0] is no object"),
        (manifest, changed(text, "name", 7), "manifest", "name is no string"),
    ]
    for path, damaged, code, fact in cases:
        error = refused(path, damaged)
        assert error.startswith(f"ScmError {code}: ") and fact in error, (path, fact, error)
    model.unlink()
    (found,) = call(site_copy, request)
    assert "ScmError network: " in found["error"] and "model.onnx cannot be read" in found["error"]


def test_a_file_that_is_larger_than_listed_or_than_memory_is_refused(
    site_copy: Path, served: Callable[[Path], str]
) -> None:
    """The server sends more than is listed, and reading stops there; the manifest lists more than there can be."""
    listed = {"path": "page.css", "size": 10, "sha256": "0" * 64, "gzip_size": 0}
    (site_copy / "page.css").write_bytes(b"x" * (1 << 22))
    script = """
    const { fetchFile } = await import(`${args[0]}/scm/files.js`);
    const events = [];
    const error = await fetchFile(new URL(args[1]), args[2], (n) => events.push(n)).catch((error) => error);
    done([error.code, error.message, Math.max(...events)]);
    """
    url = served(site_copy)
    code, message, read = run_node(script, site_copy.as_uri(), url, listed)
    assert code == "integrity" and "more than the expected 10 bytes" in message and read == 0
    code, message, _ = run_node(script, site_copy.as_uri(), url, listed | {"size": 2**52})
    assert code == "out-of-memory" and f"making room for the {2**52} bytes" in message


@pytest.mark.parametrize("images", [(16 << 20) - 2048, 20 << 20], ids=["under 4 GiB", "over 4 GiB"])
def test_a_graph_that_needs_too_much_memory_says_so(images: int, onnxruntime_web: Path, tmp_path: Path) -> None:
    """A real one: a tensor in between of as much as a WebAssembly program can have in all, or more."""
    import onnx
    from onnx import helper, numpy_helper

    from helpers.toy_bundles import write_linear_graph
    from scm_sdk.bundle.bundle import publish_bundle, write_bundle
    from scm_sdk.bundle.goldens import Golden, write_goldens
    from scm_sdk.bundle.manifest import Artifact
    from scm_sdk.spec import SamplerSpec, default_times

    spec, relative = SamplerSpec(times=default_times(1), sample_shape=(1, 8, 8)), "onnx/fp32/1step/model.onnx"
    with publish_bundle(tmp_path / "bundle") as folder:
        write_linear_graph(folder / relative, spec)
        model = onnx.load(folder / relative)
        last = model.graph.node[-1]
        large, axes = np.array([images, 1, 8, 8], np.int64), np.array([0], np.int64)
        model.graph.initializer.extend([numpy_helper.from_array(large, "large"), numpy_helper.from_array(axes, "axes")])
        before, last.input[0] = last.input[0], "mean"
        model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("Expand", [before, "large"], ["huge"]))
        mean = helper.make_node("ReduceMean", ["huge", "axes"], ["mean"], keepdims=1)
        model.graph.node.insert(len(model.graph.node) - 1, mean)
        onnx.save(model, folder / relative)
        zeros = Golden(images=np.zeros((1, 1, 8, 8), np.float32), seeds=np.zeros(1, np.int64))
        write_goldens(folder, {1: zeros})  # so that nothing runs the graph here
        write_bundle(
            folder, name="large", samplers=[spec],
            artifacts=[Artifact(path=relative, format="onnx", num_inference_steps=1)],
            parity=[passing_record(relative)],
        )  # fmt: skip
    write_site(tmp_path / "bundle", tmp_path / "site", devices=["wasm"], onnxruntime_web=onnxruntime_web)
    (found,) = call(tmp_path / "site", ({}, {"seed": 1}))
    assert found.get("error", "").startswith("ScmError out-of-memory: ") and "batchSize" in found["error"], found


def passing_record(path: str) -> Any:
    from scm_sdk.bundle.manifest import ParityRecord

    return ParityRecord(
        artifact=path, reference=path, backend="onnxruntime", threshold=1e-4, noise_floor=1e-5, max_abs=0.0,
        num_samples=8, passed=True,
    )  # fmt: skip


def test_a_call_can_be_cancelled(site: Path) -> None:
    script = """
    const { Generator } = await import(`${args[0]}/scm.js`);
    const found = [];
    const early = AbortSignal.abort();
    found.push(await Generator.load(args[0] + "/", { signal: early }).catch((error) => error.name));
    const gen = await Generator.load(args[0] + "/");
    const controller = new AbortController();
    const events = [];
    const onProgress = (event) => {
      events.push(event);
      if (event.phase === "generate" && event.loaded === 2) controller.abort();
    };
    const request = { seed: 1, numImages: 8, batchSize: 1, signal: controller.signal, onProgress };
    found.push(await gen.generate(request).catch((error) => error.name));
    const isWhole = (event) => event.phase === "download" && event.loaded === event.total;
    found.push(events.at(-1).loaded, events.some(isWhole));
    found.push((await gen.generate({ seed: 1 })).shape[0]);
    await gen.close();
    found.push(await gen.generate({ seed: 1 }).catch((error) => error.code));
    done(found);
    """
    assert run_node(script, site.as_uri()) == ["AbortError", "AbortError", 2, True, 1, "closed"]
