"""File names of checkpoints and pipelines in Hugging Face's layout, and of the parts of a bundle."""

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
DECODER_FOLDER = "decoder"
"""Folder of the decoder in a checkpoint; config and weights have the same two names."""
ENCODER_PATH = "encoder/model.onnx"
"""Graph of a bundle that encodes pictures to latents; it is no artifact, since no sampler runs it."""
INDEX_NAME = "model_index.json"
"""Index of the components of a pipeline."""
IMPORTED_CLASS = "PickledNetwork"
"""``_class_name`` in the ``config.json`` of an imported EDM or EDM2 network: tensors without code."""
CONFIG_MAX_BYTES = 8 << 20
"""Maximum size of a JSON file, bytes."""
