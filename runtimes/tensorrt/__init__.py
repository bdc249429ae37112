"""TensorRT and TensorRT-RTX: one backend for both."""
