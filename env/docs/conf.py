"""Sphinx: how the site is made of the pages that `pages.py` has laid out. Every warning is an error (see env/site)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from docstrings import as_rst, is_noise

from dinfer.version import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "dinfer"
author = "dinfer maintainers"
copyright = author
release = version = __version__
root_doc = "guide/index"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["README.md", "zh/README.md"]
suppress_warnings = [
    "mystnb.unknown_mime_type",  # widgets: a still picture stands beside them
    "misc.highlighting_failure",  # cells begin with magics, which are no Python
]

# -- pages and notebooks
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # the same anchors as on GitHub, which env/docs/links.py checks
nb_execution_mode = "cache" if os.environ.get("DINFER_SITE_EXECUTE") == "1" else "off"
nb_execution_cache_path = os.environ.get("DINFER_SITE_CACHE", "")
nb_execution_in_temp = True  # reports and saved runs that cells write do not stay
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

# -- reference
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["triton"]  # where torch has no GPU, it is not installed
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# -- looks
html_theme = "furo"
html_title = f"dinfer {version}"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css"]
html_extra_path = [str(Path(__file__).parent / "root")]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True


def _as_rst(_app: Sphinx, _what: str, _name: str, _obj: object, _options: Any, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def _skip(_app: Sphinx, _what: str, _name: str, obj: object, skip: bool, _options: Any) -> bool | None:
    return True if is_noise(obj) else skip or None


def setup(app: Sphinx) -> None:
    """Docstrings are plain text with `code` in backticks."""
    app.connect("autodoc-process-docstring", _as_rst)
    app.connect("autodoc-skip-member", _skip)
