"""Configuration of the documentation site; `make docs` builds it into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.domains.python import PyObject

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scm_sdk import __version__  # noqa: E402

project = "scm-sdk"
author = "The scm-sdk maintainers"
project_copyright = "The scm-sdk maintainers. Apache License 2.0"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
smartquotes = False  # the options of commands begin with two hyphens

# Pages are Markdown that also reads well in a repository browser.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

# Signatures show types; the docstrings describe the arguments.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"scm-sdk {release}"
html_static_path = ["_static"]
html_css_files = ["scm.css"]
html_favicon = "_static/logo.svg"
html_logo = "_static/logo.svg"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#3b5bdb", "color-brand-content": "#3b5bdb"},
    "dark_css_variables": {"color-brand-primary": "#91a7ff", "color-brand-content": "#91a7ff"},
}


def setup(app: Sphinx) -> None:
    """Label the attributes of a class "Attributes", as its docstring does."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
