"""Self-contained pages: a template of this package with the style and the cursor script that all of them share."""

from __future__ import annotations

from importlib import resources
from string import Template


def page(template: str, **values: str) -> str:
    """The page as text: `template`, a file of this package, with style and script put in and `values` in its places."""
    shared = {"style": text("page.css"), "script": text("page.js")}
    return Template(text(template)).substitute(shared | values)


def text(name: str) -> str:
    """A text file of this package."""
    return resources.files("hil.campaign").joinpath(name).read_text(encoding="utf-8")
