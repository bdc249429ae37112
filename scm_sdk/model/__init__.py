"""The sCM itself in PyTorch: the mathematics, the networks, the sampler and its checkpoint."""
