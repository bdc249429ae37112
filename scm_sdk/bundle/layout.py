"""File names of a Hugging Face folder: a checkpoint's and a pipeline's."""

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
DECODER_FOLDER = "decoder"
"""Folder inside a checkpoint with its decoder's config and weights, under the same two names."""
INDEX_NAME = "model_index.json"
"""Of a pipeline alone: which components it has."""
IMPORTED_CLASS = "PickledNetwork"
"""What ``_class_name`` says in the ``config.json`` of an imported EDM or EDM2 network: tensors without code."""
CONFIG_MAX_BYTES = 8 << 20
"""Most that a JSON file of such a folder may have."""
