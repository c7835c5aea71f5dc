"""How Sphinx makes the site of these pages: scripts/docs runs it, docs/decisions/0017 says why it is Sphinx.

The pages are plain Markdown, which reads as well on a code host; so what only the site needs is here, its table of
contents first. The source directory is the repository root, for CONTRIBUTING.md and CHANGELOG.md are pages too.
"""

from __future__ import annotations

from typing import Any

from tsenor_cli import __version__

CONTENTS = {
    "Start": {
        "Tutorial": "tutorial",
        "Choosing method and pattern": "choosing",
    },
    "How to": {
        "Pruning with calibration": "calibration",
        "What happens to a checkpoint": "checkpoints",
        "Fine-tuning": "fine-tuning",
        "Reading reports": "reports",
        "In a terminal": "terminal",
        "CI and pipelines": "ci",
        "From a laptop to a cluster": "scaling",
        "Integrations": "integrations",
        "From Python": "solving-masks",
    },
    "Reference": {
        "Commands": "commands",
        "Report schema": "report-schema",
        "Troubleshooting": "troubleshooting",
    },
    "Background": {
        "Mathematics": "mathematics",
        "Measured": "measured",
        "Security": "security",
        "Decisions": "decisions/README",
    },
    "Project": {
        "Contributing": "/CONTRIBUTING",
        "Changes": "/CHANGELOG",
    },
}

project = "tsenor"
version = release = __version__
language = "en_GB"
root_doc = "docs/index"
include_patterns = ["docs/**.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "site", "build", "tests", "scripts"]  # not even searched

extensions = ["myst_parser"]
myst_heading_anchors = 4  # the #anchors of a code host
nitpicky = True
highlight_language = "text"
smartquotes = False  # they would make one dash of the two before an option

html_theme = "furo"
html_title = "tsenor"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_extra_path = ["index.html"]  # from the root of the site to its home page
html_copy_source = False
html_use_index = False
html_show_sphinx = False
html_show_copyright = False


def add_contents(_app: object, page: str, source: list[str]) -> None:
    """Give the home page, and the list of decisions, the pages below them: a code host would show this as text."""
    if page == root_doc:
        for caption, pages in CONTENTS.items():
            entries = "\n".join(f"{title} <{target}>" for title, target in pages.items())
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"
    elif page == "docs/decisions/README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n[0-9]*\n```\n"


def setup(app: Any) -> None:  # noqa: ANN401  (Sphinx, which only the extra `docs` brings)
    app.connect("source-read", add_contents)
