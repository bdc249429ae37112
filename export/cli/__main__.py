"""``python -m scm_sdk.export.cli``: the command as a module, as torchrun starts it in each of its processes."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main(prog_name="scm-export")
