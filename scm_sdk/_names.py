"""Names of the files in a Hugging Face folder, a checkpoint's or a pipeline's."""

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "model_index.json"
"""Of a pipeline alone: which components it has."""
