"""Imports point one way: scripts -> trainer -> model, dataloader -> utils."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "utils": set(),
    "model": {"utils"},
    "dataloader": {"utils"},
    "trainer": {"utils", "model", "dataloader"},
    "zero_shot_demo.py": {"utils", "model", "dataloader"},
    "zero_shot_eval.py": {"utils", "model", "dataloader"},
}
PACKAGES = {"utils", "model", "dataloader", "trainer"}
MOST_NAMES = 30  # that train.py imports from the project


def imports(file: Path) -> list[tuple[str, list[str]]]:
    """Return (module, names) of every import statement of a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.append((node.module, [name.name for name in node.names]))
        elif isinstance(node, ast.Import):
            found += [(name.name, []) for name in node.names]
    return found


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_only_what_lies_below(place):
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    assert files
    for file in files:
        for module, names in imports(file):
            assert "*" not in names, file
            package = module.split(".")[0]
            assert package not in PACKAGES or package in MAY_IMPORT[place] | {place}, f"{file} imports {module}"


def test_train_imports_few_names():
    names = [name for module, names in imports(ROOT / "train.py") if module.split(".")[0] in PACKAGES for name in names]
    assert 0 < len(names) <= MOST_NAMES
