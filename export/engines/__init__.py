"""Build TensorRT engines, cache them, verify their kernels, and add them to a bundle."""
