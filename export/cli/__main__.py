"""``python -m scm_sdk.export.cli``: the command as a module, which torchrun needs."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main(prog_name="scm-export")
