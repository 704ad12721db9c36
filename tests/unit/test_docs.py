"""The pages keep up with the code: every command, option, file and link that they name is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hil.cli import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
EVERY = pytest.mark.parametrize("page", PAGES)
ENDINGS = r"(?:py|yaml|yml|json|md|sh|png|tle|toml|cfg)"


def commands(text: str) -> Iterator[str]:
    """`hil …` in backquotes, and lines of code blocks that begin with it."""
    inline = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (" ".join(found.split()) for found in re.findall(r"`((?:\.venv/bin/)?hil [^`]+)`", inline))
    for block in re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL):
        lines = (line.split("#")[0].strip() for line in block.splitlines())
        yield from (line for line in lines if re.match(r"(\.venv/bin/)?hil [a-z]", line))


def wrong(command: str) -> str | None:
    """What of a command line is not there; `a|b` stands for either."""
    words = [word for word in shlex.split(command)[1:] if word not in ("…", "[…]")]
    context = click.Context(cli)
    found: click.Command = cli
    while isinstance(found, click.Group) and words and not words[0].startswith("-"):
        names = words.pop(0).strip("[].").split("|")
        for name in names:
            if found.get_command(context, name) is None:
                return f"no command {name}"
        step = found.get_command(context, names[0])
        assert step is not None
        found = step
        if len(names) > 1:
            return None  # options of several commands: not looked at
    known = {name for item in found.params for name in (*item.opts, *item.secondary_opts)} | {
        "--help",
        "-h",
        "--version",
    }
    asked = [word.strip("[].").split("=")[0] for word in words if word.strip("[].").startswith("-")]
    lacking = [option for option in asked if option not in known]
    return f"no option {', '.join(lacking)}" if lacking else None


@EVERY
def test_its_commands_are_there(page: str) -> None:
    told = {command: wrong(command) for command in commands(PAGES[page])}
    assert {command: problem for command, problem in told.items() if problem} == {}


@EVERY
def test_its_files_are_there(page: str) -> None:
    named = re.findall(rf"\b((?:hil|tests|docs|fixtures|boards|grafana)/[\w./-]+\.{ENDINGS})\b", PAGES[page])
    named += re.findall(r"`((?:hil|tests|docs|fixtures|boards|grafana)/[\w./-]*)`", PAGES[page])
    assert [name for name in named if not (ROOT / name).exists()] == []


@EVERY
def test_its_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page])
    assert [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_readme_links_every_page() -> None:
    assert [page for page in PAGES if page.startswith("docs/") and f"]({page})" not in PAGES["README.md"]] == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("hil fly away", "no command fly"),
        ("hil lease acquire orin1 --now", "no option --now"),
        ("hil orbit eclipses|tides", "no command tides"),
        ("hil board power dip --depth-v=2", None),
        ("hil mission list [FILE|DIRECTORY]...", None),
    ],
)
def test_what_is_not_there_is_told(command: str, problem: str | None) -> None:
    assert wrong(command) == problem
