"""FP16, BF16 and INT8 as graph transforms, and the graphs that CPUs run fastest."""
