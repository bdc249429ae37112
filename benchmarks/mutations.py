"""Does the proof notice? Each known fault is planted into each graph of a bundle, and must be caught and named.

    python benchmarks/mutations.py scm-demo/avatars --json benchmarks/results/mutations.json

One line for each fault and rung: whether the parity gate fails, what ``diagnose`` calls it, and the node at which
``bisect`` sees it first. Exits 1 if one goes unnoticed or gets the wrong name.
"""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import msgspec
import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from scm_sdk.bundle import Bundle
from scm_sdk.dispatch import open_backend
from scm_sdk.evaluate.gate import MIN_PSNR_DB
from scm_sdk.evaluate.machine import describe_machine
from scm_sdk.evaluate.parity import compare
from scm_sdk.evaluate.reference import run_reference
from scm_sdk.export.bisect import bisect
from scm_sdk.export.compose import compose_sampler
from scm_sdk.export.diagnose import diagnose
from scm_sdk.export.graph import NetworkGraph, export_network
from scm_sdk.export.write import read_model, write_model
from scm_sdk.files import atomic_write_bytes
from scm_sdk.generator import Generator
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
            twin = stored[other]
            assert twin is not None
            site.put(name, twin.numpy())
            site.put(other, value.numpy())
    site.change("step1/sampler/mean.factor", lambda _: np.cos(np.float64(site.spec.times[0])))


def wrong_t_mid(site: Site) -> None:
    """The middle time of another scheduler."""
    site.retime(site.spec.times[0], 1.3)


def float16_time(site: Site) -> None:
    """The times went through float16."""
    site.retime(*(float(np.float16(t)) for t in site.spec.times))


def perturbed_weight(site: Site) -> None:
    """One weight tensor is 10 % off."""
    names = [name for name in site.model.graph.initializers if name.endswith(("conv0.weight", "conv_out.weight"))]
    draw = np.random.default_rng(0)
    site.change(names[-1], lambda w: w + 0.1 * w.std() * draw.standard_normal(w.shape))


def transposed_labels(site: Site) -> None:
    """Each label gives the next class."""
    site.change(
        "label_embedding.weight",
        lambda w: np.concatenate([w[1 : site.spec.num_classes], w[:1], w[site.spec.num_classes :]]),
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
    "transposed labels": ("labels", transposed_labels),
    "scaled output": ("output", scaled_output),
    "float16 time": ("time", float16_time),
}
"""Fault: what ``diagnose`` must call it, how it is planted."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was noticed of one fault."""

    fault: str
    rung: str
    gate: str
    gate_failed: bool
    diagnosis: str
    named: bool
    first_node: str

    @property
    def caught(self) -> bool:
        """Whether anything noticed."""
        return self.gate_failed or bool(self.diagnosis)


def run(path: Path, *, steps: int = 2, num_seeds: int = 32) -> list[Outcome]:
    """Plant every fault into every graph of a bundle with ``steps`` steps, and into none of them once."""
    bundle = Bundle.open(path)
    spec = bundle.spec(steps)
    model = ConsistencyModel.from_pretrained(bundle.path / "denoiser").eval()
    network = export_network(model)
    outcomes = []
    with TemporaryDirectory() as folder, Generator.from_pretrained(path, backend="torch") as reference:
        wanted = run_reference(reference, seeds=range(num_seeds), num_inference_steps=steps)
        for artifact in bundle.artifacts(format="onnx"):
            if artifact.num_inference_steps != steps:
                continue
            clean = read_model(bundle.file(artifact.path))
            for fault, (name, plant) in {"none": ("", nothing), **FAULTS}.items():
                broken = clean.clone()
                plant(Site(broken, spec, network))
                target = Path(folder) / artifact.precision / fault.replace(" ", "_") / "model.onnx"
                write_model(broken, target)
                backend = open_backend("onnxruntime", target, spec)
                least = MIN_PSNR_DB.get(artifact.precision)
                parity = compare(backend, wanted, min_psnr_db=least, reason="")
                backend.close()
                found = diagnose(broken, model, spec)
                first = bisect(broken, clean, spec).first
                outcomes.append(
                    Outcome(
                        fault=fault,
                        rung=artifact.precision,
                        gate=parity.record().finding,
                        gate_failed=not parity,
                        diagnosis=str(found[0]) if found else "",
                        named=(found[0].fault if found else "") == name,
                        first_node=first.node if first else "",
                    )
                )
    return outcomes


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--steps", type=int, default=2, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the table.")
def main(bundle: Path, steps: int, out: Path | None) -> None:
    """Plant every fault into BUNDLE's graphs and show what was noticed."""
    outcomes = run(bundle, steps=steps)
    table = Table("fault", "rung", "gate", "diagnosis", "first node that differs", box=None)
    for o in outcomes:
        table.add_row(o.fault, o.rung, ("FAIL " if o.gate_failed else "pass ") + o.gate, o.diagnosis, o.first_node)
    Console(width=200).print(table)
    planted = [o for o in outcomes if o.fault != "none"]
    clean = [o for o in outcomes if o.fault == "none"]
    caught, named = sum(o.caught for o in planted), sum(o.named for o in planted)
    print(f"{caught} of {len(planted)} caught, {named} named; "
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
