"""The README's picture: real avatars, a teacher after 35 calls if there is one, the student after 1 and after 2.

    python benchmarks/study/picture.py scm-demo/avatars docs/avatars.png --teacher runs/teacher

A row for each hair color; every generated column is one seed, and generated pictures share theirs.
"""

from pathlib import Path

import click
import numpy as np
import torch

from scm_sdk import Generator
from scm_sdk.images import make_grid, save_png, to_uint8
from scm_sdk.model.consistency import ConsistencyModel
from scm_sdk.noise import draw_noise
from scm_sdk.train.config import DataConfig
from scm_sdk.train.data.images import load_data
from scm_sdk.train.data.samples import sample_teacher

COLUMNS = 6


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--teacher", type=click.Path(path_type=Path), help="Folder of the diffusion model.")
def main(bundle: Path, out: Path, teacher: Path | None) -> None:
    """Draw OUT."""
    held_out = load_data(DataConfig(source="avatars", label="hairColor", rows=(10_000, 20_000)))
    classes = held_out.num_classes
    labels = np.repeat(np.arange(classes), COLUMNS)
    assert held_out.labels is not None
    real = [held_out.images[np.flatnonzero(held_out.labels == label)[:COLUMNS]] for label in range(classes)]
    grids = [np.concatenate(real)]
    if teacher is not None:
        model = ConsistencyModel.from_pretrained(teacher)
        noise = torch.from_numpy(draw_noise(model.spec(1), range(len(labels)))[0])
        grids.append(to_uint8(sample_teacher(model, noise, torch.from_numpy(labels)).numpy(), (-1, 1)))
    with Generator.from_pretrained(bundle) as gen:
        for steps in (1, 2):
            images = gen(
                len(labels), class_labels=labels.tolist(), num_inference_steps=steps, seed=0, output_type="uint8"
            ).images
            grids.append(images)
    columns = [make_grid(np.asarray(grid, np.uint8), COLUMNS, scale=2) for grid in grids]
    gap = np.full((columns[0].shape[0], 14, 3), 255, np.uint8)
    save_png(np.concatenate([part for column in columns for part in (column, gap)][:-1], axis=1), out)
    print(f"{out}: real |{' teacher, 35 calls |' if teacher else ''} 1 step | 2 steps")


if __name__ == "__main__":
    main()
