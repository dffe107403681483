"""The site of the documentation (Sphinx with MyST): `make docs` writes docs/_build/index.html.

The source folder is the checkout, so that links between docs/, benchmarks/ and the files at the top
are the same here and where the repository is read.
"""

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "semgen"
author = "The semgen developers"
version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "docs/**.md",
    "benchmarks/RESULTS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "docs/_build", "*.store", "semgen-demo", "tests"]

myst_heading_anchors = 3  # as on code hosting sites: page.md#a-heading
highlight_language = "text"
default_role = "literal"  # docstrings use single backticks for code
smartquotes = False  # they change the dashes of options
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other libraries have no page here
suppress_warnings = ["ref.python"]  # attributes of one name in several classes

html_theme = "furo"
html_title = f"semgen {version}"
html_extra_path = ["site"]  # index.html at the top, which leads to docs/index.html
html_show_sourcelink = False
html_copy_source = False
copybutton_selector = "div.highlight-sh pre, div.highlight-python pre, div.highlight-toml pre"


def prepare_page(_app: Sphinx, page: str, text: list[str]) -> None:
    """Links to pages show their titles; an index page gets a toctree for each of its headings."""
    text[0] = re.sub(r"\[[\w/-]+\.md\]\(", "[](", text[0])
    if not page.endswith("/index"):
        return
    for part in re.split(r"^## ", text[0], flags=re.MULTILINE)[1:]:
        caption = part.splitlines()[0]
        links = re.findall(r"^- \[.*?\]\((.*?)\.md\)", part, re.MULTILINE)
        text[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n"
        text[0] += "\n".join(links) + "\n```\n"


def setup(app: Sphinx) -> None:
    """Connect the hook."""
    app.connect("source-read", prepare_page)
