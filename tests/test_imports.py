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
}
SCRIPTS = {"utils/export.py": {"utils", "model"}}  # started as python -m utils.export, and imported by nothing


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_those_below_it(package):
    files = list((ROOT / package).glob("*.py"))
    assert files
    for file in files:
        allowed = SCRIPTS.get(f"{package}/{file.name}", MAY_IMPORT[package])
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and [name.name for name in node.names] != ["*"], file
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            ours = {module.split(".")[0] for module in modules} & MAY_IMPORT.keys()
            assert ours <= allowed | {package}, f"{file.name} imports {ours}"
            assert not {module.replace(".", "/") + ".py" for module in modules} & SCRIPTS.keys(), file
