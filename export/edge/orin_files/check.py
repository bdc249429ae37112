#!/usr/bin/env python3
"""Compare the outputs that trtexec exported with PyTorch's samples; exit 3 if they differ. No package is needed."""

import array
import json
import math
import sys


def main() -> None:
    """Read expected.json, images.bin and the outputs, and print one line for each sample."""
    with open("expected.json", encoding="utf-8") as file:
        expected = json.load(file)
    wanted = array.array("f")
    with open("images.bin", "rb") as file:
        wanted.frombytes(file.read())
    if sys.byteorder == "big":
        wanted.byteswap()
    with open(sys.argv[1], encoding="utf-8") as file:
        outputs = {each["name"]: each for each in json.load(file)}
    found = outputs.get(expected["output"])
    if found is None or len(found["values"]) != len(wanted):
        print(f"FAIL  {sys.argv[1]} has no {len(wanted)} numbers of {expected['output']!r}: run check.sh again")
        sys.exit(3)
    size = len(wanted) // expected["shape"][0]
    passed = True
    for sample in range(expected["shape"][0]):
        part = slice(sample * size, (sample + 1) * size)
        gaps = [abs(float(a) - b) for a, b in zip(found["values"][part], wanted[part], strict=True)]
        square = sum(gap * gap for gap in gaps) / size
        psnr = math.inf if square == 0 else 10 * math.log10(expected["width"] ** 2 / square)
        good = all(map(math.isfinite, gaps))
        if expected["max_abs"] is not None:
            good = good and max(gaps) <= expected["max_abs"]
        if expected["min_psnr_db"] is not None:
            good = good and psnr >= expected["min_psnr_db"]
        passed = passed and good
        print(f"{'pass' if good else 'FAIL'}  sample {sample}: largest difference {max(gaps):.1e}, PSNR {psnr:.1f} dB")
    if not passed:
        limit = expected["max_abs"] or expected["min_psnr_db"]
        print(f"expected {'at most' if expected['max_abs'] else 'at least'} {limit:g}: do not ship this engine")
        sys.exit(3)


if __name__ == "__main__":
    main()
