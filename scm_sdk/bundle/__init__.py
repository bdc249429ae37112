"""The bundle: its layout, manifest, verification, editing, archives, hub repositories and model card."""
