"""Writes docs/configuration.md from the settings' own metadata; with --check only tells whether it is current.

Run by `make fix-docs` and `make verify-docs`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from parleyd.cli import BOOLEANS, flag_of, variable_of
from parleyd.config import ModelSettings, SecuritySettings, ServerSettings

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Generated from service/parleyd/config.py by `make fix-docs`; edit that file instead. -->

Every setting of `parleyd serve` is a flag and an environment variable; the flag wins. A bad value stops the start with
its name and what is allowed, and so does an unknown flag or variable `PARLEY_…` (but for those of the command `parley`,
and those in which Kubernetes tells of services of that name). No number may be above 2147483647.
"""
SECTIONS = (("Model", ModelSettings), ("Server", ServerSettings), ("Security", SecuritySettings))


def render() -> str:
    """The page."""
    return HEAD + "".join("".join(_section(title, settings)) for title, settings in SECTIONS)


def _section(title: str, settings: type[Any]) -> Iterator[str]:
    hints = get_type_hints(settings)
    yield f"\n## {title}\n\n{_sentence(settings)}\n\n"
    yield "| flag | variable | default | allowed | meaning |\n| --- | --- | --- | --- | --- |\n"
    for option in fields(settings):
        cells = (
            _flag(option, hints[option.name]),
            f"`{variable_of(option.name)}`",
            _default(option),
            _allowed(option, hints[option.name]),
            str(option.metadata["help"]),
        )
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


def _sentence(settings: type[Any]) -> str:
    return " ".join((settings.__doc__ or "").split())


def _flag(option: Field[Any], hint: Any) -> str:
    flag = flag_of(option.name)
    return f"`{flag}`, `--no-{flag.removeprefix('--')}`" if hint in BOOLEANS else f"`{flag}`"


def _default(option: Field[Any]) -> str:
    if option.default is None:
        return ""
    return f"`{str(option.default).lower() if isinstance(option.default, bool) else option.default}`"


def _allowed(option: Field[Any], hint: Any) -> str:
    about = option.metadata
    if hint in BOOLEANS:
        return "`true`, `false`"
    if about["choices"]:
        return ", ".join(f"`{choice}`" for choice in about["choices"])
    low, high = about["minimum"], about["maximum"]
    kind = {
        int: "whole number",
        int | None: "whole number",
        float: "number",
        float | None: "number",
    }.get(hint)
    if kind is None:
        return "text"
    return kind + ("" if low is None else f", {low} or more" if high is None else f", {low} to {high}")


def main(arguments: list[str]) -> int:
    """Writes the page, or compares it. The exit code is 1 if it is not current."""
    page = render()
    if arguments != ["--check"]:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(page)
        return 0
    if TARGET.exists() and TARGET.read_text() == page:
        return 0
    print("docs/configuration.md is not what service/parleyd/config.py says: run `make fix-docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
