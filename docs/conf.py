"""The documentation's site: `make docs`, or `python -m sphinx -n -W docs build/docs`. Nothing is fetched and no notebook is run; a cross-reference that is not found ends the build."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import red

project, author, version = "red", "the red developers", red.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "extension"]
exclude_patterns = ["notebooks/.ipynb_checkpoints"]
nitpicky = True
# Only names of red must be found: the others' inventories would have to be fetched.
nitpick_ignore_regex = [("py:.*", r"(?!red\b|red_kernels\b).*")]
# Types of arguments that a caller passes on as they are.
nitpick_ignore = [("py:class", f"red.{name}") for name in ("training.projections.Factor", "starts.base.StartMaps", "lori.data.Encoded", "lori.files.Facts", "lori.subspace.GramStream",
                                                            "lori.subspace.Spectrum", "lori.trajectories.SubspaceSettings", "planning.costs.Sizes", "planning.gpus.GPU", "planning.planner.Placement")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_fence_as_directive = []
nb_execution_mode = "off"  # tests/test_notebooks.py runs them
nb_merge_streams = True

default_role = "code"  # docstrings write `code` as Markdown does
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "red"
html_show_sphinx = html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#b00e29", "color-brand-content": "#b00e29"},
    "dark_css_variables": {"color-brand-primary": "#ff7b85", "color-brand-content": "#ff7b85"},
}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
