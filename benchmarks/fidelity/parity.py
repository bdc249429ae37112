"""Compare samplers and schedulers with those of diffusers; the tests' figures as one table.

    python benchmarks/fidelity/parity.py --out benchmarks/results/parity-diffusers.md

Runs the tests that hold this package to diffusers' pipelines, samplers and scheduler on tiny random models, the same
noise on both sides, and writes each measurement and its limit. Nothing is downloaded. Exits 1 if one fails.
``pipelines.py`` compares whole pipelines, in every precision.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "model/test_sana": ("test_the_pictures_are_those_of_diffusers", "`SanaSprintPipeline`, steps, backend"),
    "model/test_foreign_denoisers": ("librarys or heun or dit", "a teacher's sampler"),
    "bundle/test_scheduler": ("test_step_for_step", "`SCMScheduler` step for step, steps"),
}
"""By test file: which tests, and what they compare."""
NAMES = {
    "test_ddim_is_the_librarys": "`UNet2DModel`, `DDIMScheduler`",
    "test_heun_is_the_second_order_solver": "`UNet2DModel`, `HeunDiscreteScheduler`",
    "test_edm_euler_is_the_librarys": "`UNet2DModel`, `EDMEulerScheduler`",
    "test_flow_euler_is_the_librarys": "`SD3Transformer2DModel`, `FlowMatchEulerDiscreteScheduler`, shift",
    "test_dit_keeps_its_labels_and_drops_its_variance": "`DiTTransformer2DModel`, `DDIMScheduler`",
}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Markdown file; stdout when absent.")
def main(out: Path | None) -> None:
    """Measure and print."""
    lines = [
        f"Largest difference from diffusers {version('diffusers')}: of pictures in [0, 1] for `SanaSprintPipeline`, of "
        "data units for `SCMScheduler`,",
        "a share of the largest value for samplers. Made by `python benchmarks/fidelity/parity.py`.",
        "",
        "| what | case | largest difference | allowed |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(ROOT / "tests" / f"{name}.py") for name in CASES]
        wanted = " or ".join(keyword for keyword, _ in CASES.values())
        command = [sys.executable, "-m", "pytest", "-q", "-k", wanted, f"--junitxml={report}", *files]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        lines += _rows(ET.parse(report).getroot())
    text = "\n".join(lines) + "\n"
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
    sys.exit(1 if done.returncode else 0)


def _rows(root: ET.Element) -> list[str]:
    rows = []
    for case in root.iter("testcase"):
        found = {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
        if "difference" not in found:
            continue
        name, _, given = case.get("name", "").rstrip("]").partition("[")
        file = case.get("classname", "").rpartition(".")[2]
        what = NAMES.get(name) or next(what for path, (_, what) in CASES.items() if path.endswith(f"/{file}"))
        parts = [part for part in given.replace("1e-05", "").replace("0.0001", "").split("-") if part]
        rows.append(
            f"| {what} | {', '.join(parts)} | {float(found['difference']):.1e} | {float(found['allowed']):.0e} |"
        )
    return rows


if __name__ == "__main__":
    main()
