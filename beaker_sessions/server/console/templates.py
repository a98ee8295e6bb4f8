"""Jinja2 for the pages: one environment, in which everything printed is escaped, and the static files they refer to."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from ... import __version__
from . import pages

HERE = Path(__file__).parent
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@cache
def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=pages.harmless,
    )
    made.globals |= {"static": static, "version": __version__}
    return made


def render(template: str, **values: Any) -> str:
    """HTML. Lone surrogates, from command lines that are not UTF-8, are escaped like control characters."""
    return environment().get_template(template).render(**values)


@cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """Static files: name -> (content, type, the content's hash)."""
    found = {}
    for path in (HERE / "static").iterdir():
        if path.suffix in TYPES:
            content = path.read_bytes()
            found[path.name] = (content, TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:12])
    return found


def static(name: str) -> str:
    """The address of a static file, which changes with its content, so that browsers may keep it for ever."""
    return f"/static/{files()[name][2]}/{name}"
