"""The ways to run one model on a CPU that ``peers.py`` times: what each is stands there."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scm_sdk import Generator, Sampler
from scm_sdk.bundle.scheduler import diffusers_scheduler
from scm_sdk.spec import SamplerSpec

PEERS = (
    "onnxruntime", "eager", "channels_last", "compile", "ort_loop", "diffusers", "openvino",
    "generator_bf16", "openvino_default", "eager_bf16", "compile_bf16",
)  # fmt: skip
REDUCED = frozenset({"generator_bf16", "openvino_default", "eager_bf16", "compile_bf16"})
"""Those that may compute in less than float32: their PSNR is shown with their time."""

Inputs = tuple[list[np.ndarray], np.ndarray]
Peer = Callable[[Inputs], np.ndarray]
"""Noise of each step and labels in, images in data units out."""


def generator(gen: Generator, spec: SamplerSpec) -> Peer:
    """The whole public call."""
    steps = spec.num_inference_steps

    def run(inputs: Inputs) -> np.ndarray:
        noise, labels = inputs
        images: np.ndarray = gen(len(labels), labels, steps, noise=noise, output_type="raw").images
        return images

    return run


def on_torch(gen: Generator, spec: SamplerSpec, kind: str) -> Peer:
    """PyTorch: as it is, with the channels last, or compiled; ``_bf16`` by autocast."""
    import torch

    low, kind = kind.endswith("_bf16"), kind.removesuffix("_bf16")

    sampler = Sampler(model_of(gen), spec)
    if kind == "channels_last":
        sampler = sampler.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run_sampler: Any = torch.compile(sampler, dynamic=False) if kind == "compile" else sampler
    layout = torch.channels_last if kind == "channels_last" else torch.contiguous_format

    def run(inputs: Inputs) -> np.ndarray:
        noise, labels = inputs
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            tensors = [torch.from_numpy(x).to(memory_format=layout) for x in noise]
            return np.asarray(run_sampler(*tensors, torch.from_numpy(labels)).float().numpy())

    return run


def ort_loop(gen: Generator, spec: SamplerSpec, work: Path, threads: int | None) -> Peer:
    """The network as one graph, the steps in numpy."""
    import onnx_ir as ir
    import onnxruntime as ort

    from scm_sdk.export.graph.network import export_network

    path = work / f"network-{gen.source.build_id[:12]}.onnx"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        ir.save(export_network(model_of(gen)).model, path)
    options = ort.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x_name, t_name, label_name = (each.name for each in session.get_inputs())
    sigma_data = np.float32(spec.sigma_data)

    def run(inputs: Inputs) -> np.ndarray:
        noise, labels = inputs
        x_0 = np.zeros_like(noise[0])
        for t, z in zip(spec.times, noise, strict=True):
            cos, sin = np.float32(np.cos(t)), np.float32(np.sin(t))
            x_t = cos * x_0 + sin * sigma_data * z
            feeds = {x_name: x_t / sigma_data, t_name: np.full(1, t, np.float32), label_name: labels}
            x_0 = cos * x_t - sin * sigma_data * session.run(None, feeds)[0]  # pyright: ignore[reportOperatorIssue]
        return x_0

    return run


def diffusers_loop(gen: Generator, spec: SamplerSpec) -> Peer:
    """The scheduler of diffusers; its own draws of noise are replaced by the given ones, at no cost."""
    import torch
    from diffusers.schedulers import scheduling_scm

    network = model_of(gen).network
    given: list[Any] = []
    scheduling_scm.randn_tensor = lambda shape, **_: given.pop(0)

    def run(inputs: Inputs) -> np.ndarray:
        noise, labels = ([torch.from_numpy(x) for x in inputs[0]], torch.from_numpy(inputs[1]))
        given[:] = [*noise[1:], torch.zeros_like(noise[0])]
        scheduler = diffusers_scheduler(spec)
        with torch.inference_mode():
            sample = float(np.sin(spec.times[0])) * spec.sigma_data * noise[0]
            for t in scheduler.timesteps[:-1]:
                F = network(sample / spec.sigma_data, t.float().expand(len(labels)), labels)
                sample, x_0 = scheduler.step(spec.sigma_data * F, t, sample, None, return_dict=False)  # pyright: ignore[reportArgumentType]
        return np.asarray(x_0.numpy())

    return run


def openvino(gen: Generator, spec: SamplerSpec, threads: int | None, *, hint: str | None) -> Peer:
    """The same sampler graph, compiled for each batch by OpenVINO, in the precision of a hint or of its own choice."""
    import openvino as ov

    core = ov.Core()
    path = gen.source.locate(gen.opened(spec.num_inference_steps).row.artifact)
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": hint} if hint else {}
    settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    compiled: dict[int, Any] = {}

    def run(inputs: Inputs) -> np.ndarray:
        noise, labels = inputs
        batch = len(labels)
        if batch not in compiled:
            model = core.read_model(path)
            model.reshape({each: [batch, *list(each.partial_shape)[1:]] for each in model.inputs})
            compiled[batch] = core.compile_model(model, "CPU", settings).create_infer_request()
        feeds = {f"noise_{i}": x for i, x in enumerate(noise)} | {"class_labels": labels}
        return np.array(next(iter(compiled[batch].infer(feeds).values())))

    return run


def model_of(gen: Generator) -> Any:
    """Return the checkpoint of a bundle, ready to run."""
    from scm_sdk import ConsistencyModel

    folder = gen.source.path / "denoiser"
    return ConsistencyModel.from_pretrained(folder if folder.is_dir() else gen.source.path).eval()


def open_peers(
    gen: Generator, spec: SamplerSpec, names: tuple[str, ...], work: Path, threads: int | None
) -> Iterator[tuple[str, Peer | str]]:
    """Make each peer, or say in a word why it is not here."""
    for name in names:
        if name == "generator_bf16":  # opened for each batch, like the generator
            continue
        try:
            if name == "onnxruntime":
                yield name, generator(gen, spec)
            elif name == "ort_loop":
                yield name, ort_loop(gen, spec, work, threads)
            elif name == "diffusers":
                yield name, diffusers_loop(gen, spec)
            elif name in ("openvino", "openvino_default"):
                yield name, openvino(gen, spec, threads, hint="f32" if name == "openvino" else None)
            else:
                yield name, on_torch(gen, spec, name)
        except ImportError as exc:
            yield name, f"not installed: {exc}"
