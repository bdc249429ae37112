"""FP16, BF16 and INT8 as graph transforms, and graphs for CPUs."""
