"""Run model.mlpackage on a Mac and compare its images with PyTorch's; exit 3 if they differ.

pip install coremltools numpy && python3 check.py
"""

import json
import sys
from pathlib import Path

import coremltools
import numpy as np


def main() -> None:
    """Print one line for each sample."""
    folder = Path(__file__).resolve().parent
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    count, *shape = expected["shape"]
    wanted = np.fromfile(folder / "images.bin", "<f4").reshape(count, *shape)
    feeds = {
        name: np.fromfile(folder / f"{name}.bin", "<i8" if facts["dtype"] == "int64" else "<f4").reshape(
            count, *facts["shape"]
        )
        for name, facts in expected["inputs"].items()
    }
    model = coremltools.models.MLModel(str(folder / "model.mlpackage"))
    passed = True
    for i in range(count):
        one = {n: a[i : i + 1].astype(np.int32 if a.dtype == np.int64 else np.float32) for n, a in feeds.items()}
        image = np.asarray(model.predict(one)[expected["output"]], np.float64).reshape(shape)
        gap = np.abs(image - wanted[i])
        psnr = 10 * np.log10(expected["width"] ** 2 / max(float((gap**2).mean()), 1e-30))
        good = bool(np.isfinite(gap).all())
        good = good and (expected["max_abs"] is None or float(gap.max()) <= expected["max_abs"])
        good = good and (expected["min_psnr_db"] is None or psnr >= expected["min_psnr_db"])
        passed = passed and good
        print(f"{'pass' if good else 'FAIL'}  sample {i}: largest difference {gap.max():.1e}, PSNR {psnr:.1f} dB")
    if not passed:
        print("do not ship this package")
        sys.exit(3)


if __name__ == "__main__":
    main()
