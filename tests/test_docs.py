"""The documentation matches the code: its links resolve, and its commands use flags and keys that exist."""

import contextlib
import io
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from trainer.run.configs import load_configs
from trainer.run.flags import parse_args
from utils.config import flatten, to_plain

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "docs", "benchmarks", "zero_shot_eval_output")
PAGES = [page.relative_to(ROOT).as_posix() for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
SCRIPT = r"(?:train|zero_shot_demo|zero_shot_eval)\.py|-m (?:[a-z_]+\.)+[a-z_]+"
COMMAND = re.compile(rf"(?:python|torchrun)[^\n`]*? (?P<script>{SCRIPT})(?P<rest>[^\n`#|;]*)")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands():
    """Yield (page, script, arguments) of every command in the documentation."""
    for page in PAGES:
        for match in COMMAND.finditer(read(page).replace("\\\n", " ")):
            yield page, match["script"].removeprefix("-m "), match["rest"]


@cache
def known_flags(script):
    """Return the flags in a script's --help; of a benchmark, whose imports take seconds, those in its source."""
    if script.startswith("benchmarks."):
        sources = (ROOT / f"{script.replace('.', '/')}.py", ROOT / "benchmarks/common.py")
        return set(re.findall(r"--\w+", "".join(source.read_text(encoding="utf-8") for source in sources)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        import_module(script.removesuffix(".py")).main(["--help"])
    return set(re.findall(r"--\w+", printed.getvalue()))


def slugs(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if not link.startswith(("http://", "https://")):
            file, _, anchor = link.partition("#")
            target = (ROOT / page).parent / file if file else ROOT / page
            assert target.exists(), link
            if anchor:
                assert anchor in slugs(target.resolve().relative_to(ROOT)), link


def test_commands_use_known_flags():
    seen = set()
    for page, script, arguments in commands():
        flags = set(re.findall(r"(?<![\w-])--\w+", arguments))
        assert flags <= known_flags(script), f"{page}: {script} has no flag {flags - known_flags(script)}"
        seen.add(script)
    assert {"train.py", "zero_shot_demo.py", "zero_shot_eval.py", "model.export", "dataloader.pack"} <= seen


def test_settings_in_commands_are_keys_of_the_configuration():
    configs = to_plain(load_configs(parse_args([], "")))
    keys = set(flatten(configs, "")) | {"model.name"}
    settings = {setting for page in PAGES for setting in re.findall(r"--set ([a-z]+\.[\w.]+)=", read(page))}
    assert settings
    assert settings <= keys, settings - keys


def test_readme_is_short():
    assert len(read("README.md").split()) <= 2100
