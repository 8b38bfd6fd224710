"""What README and docs name exists: pages, sections, files, config keys; and every tool explains itself."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode

from d2_distill.config.keys import get_distill_cfg
from d2_distill.config.user_code import add_user_config

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), ROOT / "datasets" / "README.md", *(ROOT / "docs").glob("*.md")])
}
PROGRAMS = [
    str(path.relative_to(ROOT))
    for path in sorted([ROOT / "train_net.py", *(ROOT / "tools").glob("*.py"), *(ROOT / "datasets").glob("*.py")])
]
FENCE = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
KEY = re.compile(r"(?<![\w.])(?:MODEL|SOLVER|DATASETS|DATALOADER|INPUT|TEST)(?:\.[A-Z0-9_]+)+(?!\w)")
PATH = re.compile(r"(?<![\w./-])(?:configs|tools|docs|d2_distill|datasets|examples|tests)/[\w./*{},-]*[\w}*]")
COMMAND = re.compile(r"python3? ((?:tools/|datasets/)?\w+\.py)((?:[^`\n\\]|\\\n)*)")
# Made by the commands that name them.
MADE = re.compile(r"configs/mine|datasets/(quickstart|bccd|coco|VOC)")


def slugs(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", PAGES[page]), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> Iterator[str]:
    """Targets of a page's links and pictures in the project."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page])):
        if "://" not in target:
            yield target


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for target in links(page):
        name, _, fragment = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if fragment:
            assert fragment in slugs(str(path.resolve().relative_to(ROOT))), target


def test_every_page_is_linked():
    linked = {
        str(((ROOT / page).parent / target.partition("#")[0]).resolve().relative_to(ROOT))
        for page in PAGES for target in links(page) if target.partition("#")[0]
    }
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


@functools.lru_cache(maxsize=None)
def all_keys() -> set[str]:
    """Every key and node of a config."""
    found: set[str] = set()

    def walk(node: CfgNode, prefix: str) -> None:
        for key, value in node.items():
            found.add(prefix + key)
            if isinstance(value, CfgNode):
                walk(value, f"{prefix}{key}.")

    walk(get_distill_cfg(), "")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_config_keys(page):
    # The example of a method of one's own has a node of its own.
    named = {key for key in KEY.findall(PAGES[page]) if not key.startswith("MODEL.DISTILL.CWD")}
    assert named <= all_keys()


@pytest.mark.parametrize("page", PAGES)
def test_configs(page):
    """Keys and types of the values."""
    for block in re.findall(r"^ *```yaml\n(.*?)^ *```", PAGES[page], flags=re.MULTILINE | re.DOTALL):
        values = yaml.safe_load(block)
        values.pop("_BASE_", None)
        cfg = get_distill_cfg()
        add_user_config(cfg, [str(ROOT / path) for path in re.findall(r"examples/\w+\.py", block)])
        cfg.merge_from_other_cfg(CfgNode(values))


def expanded(pattern: str) -> list[str]:
    """The patterns without braces that a pattern with alternatives in braces stands for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    rests = (pattern[: match.start()] + choice + pattern[match.end() :] for choice in match[1].split(","))
    return [result for rest in rests for result in expanded(rest)]


@pytest.mark.parametrize("page", PAGES)
def test_paths(page):
    for named in PATH.findall(PAGES[page]):
        for pattern in expanded(named):
            # "..." stands for any name, and docs may leave the ending out.
            pattern = pattern.partition("...")[0].rstrip("/") + ("*" if "..." in pattern else "")
            known = any(list(ROOT.glob(pattern + ending)) for ending in ("", ".yaml", ".py"))
            assert known or MADE.match(pattern), named


@functools.lru_cache(maxsize=None)
def help_of(program: str, *command: str) -> str:
    """What a program, or a command of it, prints for --help."""
    spec = importlib.util.spec_from_file_location("__main__", ROOT / program)
    text = io.StringIO()
    arguments, sys.argv = sys.argv, [program, *command, "--help"]
    try:
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stop:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    finally:
        sys.argv = arguments
    assert not stop.value.code
    return text.getvalue()


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_choose_detectron2_before_they_import_it(program):
    """Importing d2_distill does; in this process that has happened already."""
    tree = ast.parse((ROOT / program).read_text(encoding="utf-8"))
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in tree.body
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    packages = [module.partition(".")[0] for module in modules]
    assert "d2_distill" in packages
    assert "detectron2" not in packages[: packages.index("d2_distill")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_an_example(program):
    assert re.search(rf"python {program} \S", help_of(program))


@pytest.mark.parametrize("page", PAGES)
def test_commands(page):
    """Programs and their options."""
    for program, rest in COMMAND.findall(PAGES[page]):
        assert program in PROGRAMS, program
        words = rest.replace("\\\n", " ").split()
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        usage = help_of(program).partition("\n\n")[0]  # "name {one,two}" or "name one|two" where it has commands
        first = [word for word in words[:1] if not word.startswith("-")]
        command = [word for word in first if re.search(rf"[{{|,\s]{re.escape(word)}[}}|,\s]", usage)]
        known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(program, *command)))
        assert options <= known, (program, command, options - known)
