"""The sampler as an ONNX graph: network export, cleanup, composition, writing."""
