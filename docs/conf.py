"""Settings of Sphinx. `make docs` builds without network access."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # autodoc imports mpisave from here

project = "mpisave"
author = "the mpisave authors"
copyright = author

# Read, not imported: the version is a plain string.
_source = (ROOT / "mpisave" / "__init__.py").read_text(encoding="utf-8")
_found = re.search(r'^__version__ = "([^"]+)"$', _source, flags=re.MULTILINE)
if _found is None:
    raise RuntimeError('mpisave/__init__.py has no line __version__ = "..."')
release = version = _found[1]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"mpisave {version}"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

# Links into other projects' documentation need their inventories from the network.
_INVENTORIES = {
    "python": ("https://docs.python.org/3", None),
    "mpi4py": ("https://mpi4py.readthedocs.io/en/stable", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "cupy": ("https://docs.cupy.dev/en/stable", None),
    "h5py": ("https://docs.h5py.org/en/stable", None),
}
_is_online = os.environ.get("MPISAVE_DOCS_ONLINE") == "1"
intersphinx_mapping = _INVENTORIES if _is_online else {}
