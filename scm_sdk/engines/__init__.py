"""TensorRT engines: GPU targets, the two NVIDIA libraries, compatibility with a machine."""
