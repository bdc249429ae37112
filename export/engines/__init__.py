"""Build TensorRT engines, cache them, verify what was built, and add them to a bundle."""
