"""Measure the peak memory of a SANA-Sprint in one graph, split, and with its parts loaded in turn; random weights.

    python benchmarks/engines/split_memory.py 0.6B --work runs/split --json benchmarks/results/split-memory.json

A pipeline of the layout is saved with a text encoder of Gemma 2 whose width is that of the 2B model, with fewer layers
and words (``--encoder-layers``, ``--words``). It is imported twice with the text encoder as a graph: ``whole``, where
the decoder ends the sampler graph, and ``split``. Then each way of running makes one image from a prompt by ONNX
Runtime in a process of its own, whose peak resident memory the system reports: ``run whole``, ``run split`` with all
parts open, and ``run offload`` with one part in memory at a time. ``equal`` says whether the image has the bits of
``run whole``. A stage that is done is not done again.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from import_sana import DC_AE, LAYOUTS, SHARED
from stages import Stages, run_stage, say

PROMPT, SEED, TOKENS = "a red fox in the snow", 1, 300
ENCODER: dict[str, Any] = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip


def weights(folder: Path, layout: str, options: dict[str, int]) -> dict[str, Any]:
    """Save the pipeline, bfloat16."""
    import torch
    from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    config = Gemma2Config(vocab_size=options["words"], num_hidden_layers=options["encoder_layers"], **ENCODER)
    parts = SanaTransformer2DModel(**LAYOUTS[layout], **SHARED), AutoencoderDC(**DC_AE), Gemma2Model(config)
    pipeline = SanaSprintPipeline(
        transformer=parts[0],
        vae=parts[1],
        scheduler=SCMScheduler(),  # pyright: ignore[reportArgumentType]
        text_encoder=parts[2],  # pyright: ignore[reportArgumentType]
        tokenizer=GemmaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[]),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return {"parameters": [sum(p.numel() for p in part.parameters()) for part in parts]}


def import_(split: bool, folder: Path, layout: str, options: dict[str, int]) -> dict[str, Any]:
    """Make a bundle with one graph."""
    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.export.sana import import_sana

    bundle = folder / ("split" if split else "whole")
    import_sana(
        folder / "pipeline", bundle, steps=(options["steps"],), size=(options["size"], options["size"]), max_batch=1,
        max_sequence_length=TOKENS, text_encoder=False, onnx_text_encoder=True, split=split, overwrite=True,
        events=Stages(),
    )  # fmt: skip
    graphs = [entry for entry in Bundle.open(bundle, verify="none").manifest.files if entry.role == "graph-data"]
    return {"bytes": {entry.path: entry.size for entry in graphs}}


def run(name: str, folder: Path, layout: str, options: dict[str, int]) -> dict[str, Any]:
    """Make one image from a prompt."""
    import numpy as np

    from scm_sdk.inference.generator import Generator

    bundle = folder / ("whole" if name == "whole" else "split")
    start = time.perf_counter()
    with Generator.from_pretrained(
        bundle, backend="onnxruntime", num_threads=1, verify="none", offload=name == "offload"
    ) as gen:
        opened = time.perf_counter()
        out = gen(1, prompt=PROMPT, seed=SEED, output_type="raw")
    if name == "whole":
        np.save(folder / "image.npy", out.images)
    wanted = np.load(folder / "image.npy")
    return {
        "seconds_of_opening": round(opened - start, 1),
        "seconds_of_call": round(time.perf_counter() - opened, 1),
        "equal": bool(np.array_equal(out.images, wanted)),
        "max_abs_difference": float(np.abs(out.images - wanted).max()),
        "timings_ms": {part: round(value) for part, value in out.info.timings.items()},
    }


STAGES: dict[str, Callable[[Path, str, dict[str, int]], dict[str, Any]]] = {
    "weights": weights,
    "import whole": partial(import_, False),
    "run whole": partial(run, "whole"),
    "import split": partial(import_, True),
    "run split": partial(run, "split"),
    "run offload": partial(run, "offload"),
}
LAST_OF = {"run whole": "whole", "import split": "pipeline", "run offload": "split"}
"""Stage after which a folder is not needed."""


@click.command()
@click.argument("layout", type=click.Choice(list(LAYOUTS)))
@click.option("--layers", type=click.IntRange(1), help="Fewer layers of the transformer than the layout has.")
@click.option("--encoder-layers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--words", type=click.IntRange(64), default=8000, show_default=True, help="Rows of its embedding.")
@click.option("--steps", type=click.IntRange(1), default=1, show_default=True)
@click.option("--size", type=click.IntRange(32), default=1024, show_default=True, help="Height and width, pixels.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/split"), show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File that keeps the table; it is added to.")
@click.option("--stage", type=click.Choice(list(STAGES)), hidden=True, help="Run this one here, for its parent.")
def main(
    layout: str, layers: int | None, encoder_layers: int, words: int, steps: int, size: int, work: Path,
    out: Path | None, stage: str | None,
) -> None:  # fmt: skip
    """Measure LAYOUT."""
    options = {"encoder_layers": encoder_layers, "words": words, "steps": steps, "size": size}
    if layers is not None:
        LAYOUTS[layout]["num_layers"] = options["layers"] = layers
    folder = work / "-".join([layout, *(f"{name}{value}" for name, value in options.items())])
    folder.mkdir(parents=True, exist_ok=True)
    if stage is not None:
        found = STAGES[stage](folder, layout, options)
        (folder / f"{stage}.partial.json").write_text(json.dumps(found), encoding="utf-8")
        return
    for each in STAGES:
        done = folder / f"{each}.json"
        if not done.exists():
            found = run_stage([*sys.argv, "--stage", each], folder / f"{each}.partial.json")
            found["peak_gib"] = round(found.pop("peak_bytes") / 2**30, 2)
            done.write_text(json.dumps(found), encoding="utf-8")
            if each in LAST_OF:
                shutil.rmtree(folder / LAST_OF[each])
            say(f"{each}: {json.dumps(found)}")
    if out is not None:
        _keep(layout, options, folder, out)


def _keep(layout: str, options: dict[str, int], folder: Path, out: Path) -> None:
    from scm_sdk import __version__
    from scm_sdk._util.machine import describe_machine

    table = json.loads(out.read_bytes()) if out.exists() else {}
    name = ", ".join([layout, *(f"{option} {value}" for option, value in options.items())])
    stages = {each: json.loads((folder / f"{each}.json").read_bytes()) for each in STAGES}
    table[name] = {"machine": describe_machine(), "scm_sdk": __version__, **stages}
    out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
