"""Insert each known fault into each graph of a bundle; the validation must find and name it.

    python benchmarks/fidelity/mutations.py scm-demo/avatars --json benchmarks/results/mutations.json

One line for each fault and precision: the result of ``scm-export validate`` for a bundle with the faulty graph,
whether the numbers alone show the fault, its name in the output, and the first node at which ``bisect`` finds it.
Exits 1 if the command accepts a fault or names another one.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import msgspec
import numpy as np
import onnx_ir as ir
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk._util.machine import describe_machine
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import extend_bundle
from scm_sdk.bundle.manifest import Artifact
from scm_sdk.export.cli import main as scm_export
from scm_sdk.export.diagnose.bisect import bisect
from scm_sdk.export.graph.compose import compose_sampler
from scm_sdk.export.graph.io import read_model, write_model
from scm_sdk.export.graph.network import NetworkGraph, export_network
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.spec import SamplerSpec


@dataclass(frozen=True)
class Site:
    """Where a fault is planted: a graph that may be changed, its sampler, and the network to compose others from."""

    model: ir.Model
    spec: SamplerSpec
    network: NetworkGraph

    def change(self, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
        """Replace a stored tensor; its type and shape stay."""
        value = self.model.graph.initializers[name]
        assert value.const_value is not None
        before = value.const_value.numpy()
        after = edit(before.astype(np.float64)).astype(before.dtype)
        value.const_value = ir.tensor(after, name=name)

    def put(self, name: str, array: np.ndarray) -> None:
        """Replace a stored tensor by another of its shape."""
        self.change(name, lambda _: array)

    def retime(self, *times: float) -> None:
        """Make everything that depends on the time as a sampler with other times would have it."""
        other = compose_sampler(self.network, msgspec.structs.replace(self.spec, times=times)).graph.initializers
        for name in self.model.graph.initializers:
            if name.startswith("step") and name in other:
                stored = other[name].const_value
                assert stored is not None
                self.put(name, stored.numpy())


def nothing(site: Site) -> None:
    """No fault: what is right must pass for right."""


def wrong_sigma_data(site: Site) -> None:
    """The network was trained with another sigma_data than the sampler uses."""
    site.change("sampler/sigma_data", lambda x: x * 1.2)
    for name in site.model.graph.initializers:
        if name.endswith(("x_t.factor", "spread.factor", "removed.factor")):
            site.change(name, lambda x: x * 1.2)


def swapped_steps(site: Site) -> None:
    """The second step's constants come first."""
    stored = {name: value.const_value for name, value in site.model.graph.initializers.items()}
    pairs = {"x_t.factor": "spread.factor"}
    for name, value in stored.items():
        if name.startswith("step0/") and value is not None:
            other = "step1/" + name.removeprefix("step0/")
            for mine, theirs in pairs.items():
                other = other.replace(mine, theirs)
            twin = stored.get(other)
            if twin is None:  # int8 leaves out layers of one step that it takes in another
                continue
            site.put(name, twin.numpy())
            site.put(other, value.numpy())
    site.change("step1/sampler/mean.factor", lambda _: np.cos(np.float64(site.spec.times[0])))


def wrong_t_mid(site: Site) -> None:
    """The middle time of another scheduler."""
    site.retime(site.spec.times[0], 1.3)


def float16_time(site: Site) -> None:
    """The times went through float16."""
    site.retime(*(float(np.float16(t)) for t in site.spec.times))


def first_stored(site: Site, *endings: str) -> str:
    """Return the first tensor of a layer that int8 quantizes, of a U-Net or a transformer."""
    ends = tuple(f"{weight}{ending}" for weight in ("conv0.weight", "mlp0/MatMul.in1") for ending in endings)
    return next(name for name in site.model.graph.initializers if name.endswith(ends))


def perturbed_weight(site: Site) -> None:
    """One weight tensor of a layer that int8 quantizes is 10 % off; in int8 its codes are."""
    draw = np.random.default_rng(0)

    def edit(w: np.ndarray) -> np.ndarray:
        noisy: np.ndarray = w + 0.1 * w.std() * draw.standard_normal(w.shape)
        if not np.issubdtype(w.dtype, np.integer):
            return noisy
        codes: np.ndarray = np.rint(noisy).clip(np.iinfo(w.dtype).min + 1, np.iinfo(w.dtype).max)
        return codes

    site.change(first_stored(site, "", ".int8", ".equalized.int8", "_quantized"), edit)


def wrong_scale(site: Site) -> None:
    """One output channel of a layer is 5 % too strong; in int8 its scale is."""
    try:
        name = first_stored(site, ".scale", ".equalized.scale", "_scale")
    except StopIteration:
        name = first_stored(site, "")

    def edit(w: np.ndarray) -> np.ndarray:
        channels = np.moveaxis(np.atleast_1d(w), -1 if "MatMul" in name else 0, 0)  # a view
        channels[0] *= 1.05
        return w

    site.change(name, edit)


def transposed_labels(site: Site) -> None:
    """Each label gives the next class."""
    for name in site.model.graph.initializers:
        if name.endswith(("labels/table", "label_embedding.weight")):
            site.change(
                name, lambda w: np.concatenate([w[1 : site.spec.num_classes], w[:1], w[site.spec.num_classes :]])
            )


def scaled_output(site: Site) -> None:
    """The pictures are 2 % too strong."""
    graph = site.model.graph
    (images,) = graph.outputs
    factor = ir.val("late.factor", const_value=ir.tensor(np.array(1.02, np.float32), name="late.factor"))
    graph.initializers["late.factor"] = factor
    images.name = "images_before"
    out = ir.val(site.spec.output_name, images.dtype, images.shape)
    graph.append(ir.Node("", "Mul", [images, factor], outputs=[out], name="late/Mul"))
    graph.outputs[0] = out


FAULTS: dict[str, tuple[str, Callable[[Site], None]]] = {
    "wrong sigma_data": ("sigma_data", wrong_sigma_data),
    "swapped step order": ("time", swapped_steps),
    "wrong t_mid": ("time", wrong_t_mid),
    "perturbed weight": ("weights", perturbed_weight),
    "wrong channel scale": ("weights", wrong_scale),
    "transposed labels": ("labels", transposed_labels),
    "scaled output": ("output", scaled_output),
    "float16 time": ("time", float16_time),
}
"""Fault: what the command must call it, how it is planted."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was noticed of one fault."""

    fault: str
    rung: str
    gate: str
    numbers_pass: bool
    exit_code: int
    diagnosis: str
    named: bool
    first_node: str

    @property
    def caught(self) -> bool:
        """Whether the command failed, and the bundle says so."""
        return self.exit_code == 3


def run(
    path: Path,
    *,
    steps: int = 2,
    options: Sequence[str] = (),
    wanted: Callable[[str, str], bool] = lambda rung, fault: True,
) -> list[Outcome]:
    """Plant every fault into every graph of a bundle with ``steps`` steps, and into none of them once.

    ``options`` go to ``scm-export validate``; ``wanted`` leaves out pairs of a precision and a fault.
    """
    bundle = Bundle.open(path)
    spec = bundle.spec(steps)
    network = export_network(ConsistencyModel.from_pretrained(bundle.path / "denoiser").eval())
    outcomes = []
    for artifact in bundle.artifacts(format="onnx"):
        if artifact.num_inference_steps != steps:
            continue
        clean = read_model(bundle.file(artifact.path))
        for fault, (name, plant) in {"none": ("", nothing), **FAULTS}.items():
            if not wanted(artifact.precision, fault):
                continue
            broken = clean.clone()
            plant(Site(broken, spec, network))
            result, exit_code = _validate(path, artifact, broken, options)
            first = bisect(broken, clean, spec).first
            outcomes.append(
                Outcome(
                    fault=fault,
                    rung=artifact.precision,
                    gate=_numbers(result),
                    numbers_pass=result["numbers_pass"],
                    exit_code=exit_code,
                    diagnosis=result["fault"],
                    named=result["fault"].partition(",")[0] == name,
                    first_node=first.node if first else "",
                )
            )
    return outcomes


def _numbers(result: dict[str, Any]) -> str:
    overall = result["overall"]
    if result["gate"] == "max_abs":
        return f"max {overall['max_abs']:.1e} of {result['threshold']:.1e}"
    return f"95 % reach {overall['psnr_p05_db']:.1f} dB of {result['threshold']:.0f}"


def _validate(path: Path, artifact: Artifact, graph: ir.Model, options: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Validate a copy of a bundle that holds ``graph``; return the record of the artifact and the exit code."""
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(path, Path(folder) / "bundle"))
        with extend_bundle(copy) as draft:
            write_model(graph, draft.path(artifact.path))
            entry = next(e for e in draft.bundle.manifest.files if e.path == artifact.path)
            draft.add(artifact, entry.built_from)
        arguments = ["validate", str(copy), "--precision", artifact.precision, "--json", *options]
        arguments += ["--steps", str(artifact.num_inference_steps), "--backend", "onnxruntime"]
        done = CliRunner().invoke(scm_export, arguments)
        if done.exit_code not in (0, 3):
            raise RuntimeError(done.output) from done.exception
        (result,) = json.loads(done.stdout)["parity"]
        (record,) = [
            r for r in Bundle.open(copy).manifest.parity if (r.artifact, r.backend) == (artifact.path, "onnxruntime")
        ]
        assert record.passed == (done.exit_code == 0), "what the command says, it records"
        return result, done.exit_code


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--steps", type=int, default=2, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the table.")
def main(bundle: Path, steps: int, out: Path | None) -> None:
    """Plant every fault into BUNDLE's graphs and show what was noticed."""
    outcomes = run(bundle, steps=steps)
    table = Table("fault", "rung", "validate", "by its numbers alone", "called", "first node that differs", box=None)
    for o in outcomes:
        verdict, numbers = "FAIL" if o.caught else "pass", "pass" if o.numbers_pass else "FAIL"
        table.add_row(o.fault, o.rung, verdict, f"{numbers} {o.gate}", o.diagnosis, o.first_node)
    Console(width=200).print(table)
    planted = [o for o in outcomes if o.fault != "none"]
    clean = [o for o in outcomes if o.fault == "none"]
    caught, named = sum(o.caught for o in planted), sum(o.named for o in planted)
    print(f"{caught} of {len(planted)} refused by validate, {sum(not o.numbers_pass for o in planted)} by its numbers "
          f"alone; {named} named; "
          f"{sum(not o.diagnosis for o in clean)} of {len(clean)} clean graphs pass for clean")  # fmt: skip
    if out:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "outcomes": [asdict(o) for o in outcomes],
        }
        atomic_write_bytes(out, json.dumps(record, indent=2).encode() + b"\n")
    sys.exit(not (caught == named == len(planted) and not any(o.diagnosis for o in clean)))


if __name__ == "__main__":
    main()
