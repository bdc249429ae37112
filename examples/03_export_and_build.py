"""From a checkpoint to a bundle: graphs, FP16, a TensorRT-RTX engine for a GPU that need not be here, one file to send.

    python examples/03_export_and_build.py runs/tiny/student runs/tiny/bundle

Run it again: what would come out the same is left alone. `scm-export all` does this in one command.
"""

import argparse
from pathlib import Path

from scm_sdk import BackendUnavailable, Bundle, EventLines, Generator, add_engines, build_all, validate


def main(checkpoint: Path, bundle: Path) -> None:
    """Export, lower, build, validate, pack; the bundle's README.md records each step."""
    build_all(checkpoint, bundle, precisions=["fp16"], max_batch=4, events=EventLines(print))
    try:
        for engine in add_engines(bundle, ["l4"], precisions=["fp16"], steps=[1]):
            print(f"{engine.path}: {'there already' if engine.unchanged else 'built'}")
    except BackendUnavailable as exc:  # TensorRT-RTX has no wheel for this machine
        print(f"no engine: {exc}")

    for parity in validate(bundle, num_seeds=8, batches=[4]):
        print(f"{parity.candidate}: {parity.overall.psnr_db:.1f} dB, passed: {bool(parity)}")
        parity.raise_if_failed()

    file = Bundle.open(bundle).pack(bundle.with_suffix(".scmz"))
    with Generator.from_pretrained(file) as gen:  # a folder, a .scmz file or a hub id
        print(gen.plan())
        print(gen(num_images=4, seed=0).info.artifact)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="training run or saved model")
    parser.add_argument("bundle", type=Path, help="folder to write")
    main(**vars(parser.parse_args()))
