"""Export a checkpoint and let a gate decide, as a CI job would.

python examples/03_export_and_validate.py runs/tiny/student runs/tiny/bundle
"""

import sys
from pathlib import Path

from scm_sdk.errors import ParityError
from scm_sdk.evaluate.gate import validate_bundle
from scm_sdk.export.pipeline import export_bundle


def main(checkpoint: Path, bundle: Path) -> int:
    """Return 0 if ONNX Runtime makes the checkpoint's pictures, 3 if it does not."""
    report = export_bundle(checkpoint, bundle, steps=(1, 2), overwrite=True, progress=print)
    print(f"{report.path}: build {report.build_id[:12]}, {report.bytes / 1e6:.1f} MB")
    try:
        for parity in validate_bundle(bundle):
            print(f"{parity.candidate}: max {parity.max_abs:.1e} of {parity.threshold:.1e} allowed")
            parity.raise_if_failed()
    except ParityError as exc:
        print(exc)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
