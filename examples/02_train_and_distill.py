"""Train a teacher and distill it from Python; tiny and short, to show the calls.

    python examples/02_train_and_distill.py runs/tiny

For a good model use more iterations: the commands of the README, or scm_sdk/assets/avatars.
"""

import argparse
from pathlib import Path

import numpy as np

from scm_sdk.model import PRESETS
from scm_sdk.train import DataConfig, Hooks, OptimizerConfig, TangentConfig, TrainConfig, train


def main(out: Path, iterations: int = 40) -> None:
    """Train on generated 8x8 crosses in two brightnesses, then distill."""
    out.mkdir(parents=True, exist_ok=True)
    images = np.zeros((64, 8, 8, 1), np.uint8)
    images[:, 3:5], images[:, :, 3:5] = 255, 255
    images[::2] //= 2
    np.savez(out / "crosses.npz", images=images, kind=np.arange(64) % 2, kind_names=["dark", "bright"])
    data = DataConfig(source=str(out / "crosses.npz"), label="kind")
    hooks = Hooks(on_log=lambda line: print(f"{line.iteration}: residual {line.residual:.4f}"), log_every=20)

    teacher = TrainConfig(
        objective="diffusion", data=data, network=PRESETS["tiny"](num_classes=2), num_iterations=iterations
    )
    train(teacher, out / "teacher", hooks)
    student = TrainConfig(
        objective="scd", data=data, teacher=str(out / "teacher"), num_iterations=iterations,
        optimizer=OptimizerConfig(name="radam", learning_rate=5e-4),
        tangent=TangentConfig(norm="rms", warmup_iterations=100),
    )  # fmt: skip
    model = train(student, out / "student", hooks)
    print(f"{out / 'student'}: {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/tiny"), help="default: %(default)s")
    main(parser.parse_args().out)
