"""The consistency model in PyTorch: mathematics, networks, sampler and checkpoint."""
