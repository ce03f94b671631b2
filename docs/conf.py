"""The site, built by ``python -m sphinx -W --keep-going docs docs/_build/html``: warnings are errors."""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]
os.environ.setdefault("KERAS_BACKEND", "torch")  # for the reference and the gallery

import themes  # noqa: E402

import fastclstm  # noqa: E402

project = "fastclstm"
author = "The fastclstm authors"
copyright = "2025–2026, the fastclstm authors, MIT licence"
version = release = fastclstm.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "names",
    "pictures",
    "signatures",
    "tables",
]
exclude_patterns = ["_build", "_templates", "_extensions"]
templates_path = ["_templates"]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
nitpicky = True
default_role = "name"
toc_object_entries_show_parents = "hide"
suppress_warnings = ["config.cache"]  # the gallery's configuration holds functions

# Docstrings: types and defaults stand in their sections, so signatures are short.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# Markdown
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# The gallery: every script whose docstring has a title is executed; several_processes.py, for one, has none.
EXAMPLES = HERE.parent / "examples"
TITLED = re.compile(r'"""\n?[^\n]+\n[=-]{3,}\n')
UNTITLED = [path.name for path in sorted(EXAMPLES.glob("*.py")) if not TITLED.search(path.read_text())]
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "ignore_pattern": "|".join(rf"\b{re.escape(name)}$" for name in UNTITLED),
    "image_scrapers": (themes.scrape,),
    "abort_on_example_error": False,  # a failure is a warning, and -W makes it an error: of all of them at once
    "backreferences_dir": None,
    "download_all_examples": False,
    "show_signature": False,
    "remove_config_comments": True,
    "min_reported_time": 1,
}

html_theme = "pydata_sphinx_theme"
html_title = "fastclstm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_sidebars = {name: [] for name in ("index", "start", "compatibility", "changelog", "contributing")}
html_theme_options = {
    "logo": {"text": "fastclstm"},
    "navbar_align": "left",
    "header_links_before_dropdown": 5,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
