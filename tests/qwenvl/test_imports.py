"""What importing `qwenvl` brings along, and what it does not."""

import ast
import subprocess
import sys
from pathlib import Path

import qwenvl
from finetune.errors import UserError

PACKAGE = Path(qwenvl.__file__).parent


def run(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    ).stdout


def test_peft_is_imported_inside_functions_of_loading_alone():
    def imports_peft(node: ast.AST) -> bool:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        return any(name.partition(".")[0] == "peft" for name in names)

    found = set()
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        anywhere = {node for node in ast.walk(tree) if imports_peft(node)}
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        inside = {node for function in functions for node in ast.walk(function) if imports_peft(node)}
        if_typing = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for_types = {node for block in if_typing for node in ast.walk(block) if imports_peft(node)}
        assert anywhere == inside | for_types, file
        if inside:
            found.add(file.name)
    assert found == {"loading.py"}


def test_a_users_errors_are_known_before_anything_heavy_is_loaded():
    printed = run(
        "import sys, finetune.errors; light = 'torch' not in sys.modules and 'qwenvl' not in sys.modules;"
        "import qwenvl; print(light, finetune.errors.InputError is qwenvl.InputError is qwenvl.errors.InputError)"
    )
    assert printed == "True True\n"
    assert issubclass(UserError, qwenvl.InputError) and issubclass(qwenvl.InputError, ValueError)
