"""What describes a TensorRT engine: GPU targets, the two NVIDIA libraries, compatibility with this machine."""
