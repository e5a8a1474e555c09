"""The scripts stand alone and contain copies of functions, which must stay identical.

| tests | subject |
|---|---|
| shared block | identical in three scripts and in extras/ |
| functions, methods | the same name means the same code |
| imports | no script imports another |
"""

import ast
import difflib
import re
from collections import defaultdict

import pytest
from conftest import ROOT

SCRIPTS = ["download_dataset.py", "prepare_data.py", "train_sam2_proper.py", "compare_models.py", "test_my_image.py"]
WITH_BLOCK = SCRIPTS[2:]
EXTRAS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "extras").glob("*.py"))
EXTRAS.append("extras/sam_med3d_ich/utils.py")
OWN = {"main", "parse_args"}  # every script has its own
COPIED_METHODS = {"position", "on_press", "dragged_box"}


def source(script):
    return (ROOT / script).read_text(encoding="utf-8")


def block(script):
    text = source(script)
    assert text.count("# ---- shared block") == text.count("# ---- end of shared block ----") == 1
    return text[text.index("# ---- shared block"):text.index("# ---- end of shared block ----")]


@pytest.mark.parametrize("script", WITH_BLOCK[1:])
def test_the_shared_block_is_identical_in_the_three_scripts(script):
    first, second = block(WITH_BLOCK[0]).splitlines(), block(script).splitlines()
    assert not "\n".join(difflib.unified_diff(first, second, WITH_BLOCK[0], script, lineterm=""))


def test_the_shared_block_contains_the_required_functions():
    names = {node.name for node in ast.parse(block(WITH_BLOCK[0])).body if isinstance(node, ast.FunctionDef)}
    assert names >= {"detect_device", "calculate_iou", "read_image", "read_mask", "load_predictor", "fail"}


def test_extras_contain_an_identical_copy_of_the_shared_block():
    text = block(WITH_BLOCK[0])
    files, models = text[text.index("class ImageError"):].rstrip().split("\n\n\ndef read_config")
    assert files in source("extras/files.py") and "def read_config" + models in source("extras/common.py")


def test_sam_med3d_ich_and_its_imports_do_not_import_sam2():
    extras = ROOT / "extras"
    for path in (extras / "files.py", extras / "volume_files.py", *(extras / "sam_med3d_ich").glob("*.py")):
        assert not re.search(r"^ *(import|from) (sam2|common)\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_functions_of_the_same_name_have_the_same_code_in_every_script():
    found = defaultdict(dict)
    for script in [*SCRIPTS, *EXTRAS]:
        text = source(script)
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name not in OWN:
                found[node.name][script] = ast.get_source_segment(text, node)
    differing = {name: list(copies) for name, copies in found.items() if len(set(copies.values())) > 1}
    assert not differing


def test_methods_copied_between_the_two_window_classes_are_identical():
    found = []
    for script in ("test_my_image.py", "extras/window.py"):
        window, = (node for node in ast.parse(source(script)).body if getattr(node, "name", "") == "Window")
        found.append({node.name: ast.get_source_segment(source(script), node) for node in window.body
                      if isinstance(node, ast.FunctionDef) and node.name in COPIED_METHODS})
    assert found[0] == found[1] and found[0].keys() == COPIED_METHODS


def test_no_script_imports_another():
    stems = {script.removesuffix(".py") for script in SCRIPTS}
    for script in SCRIPTS:
        for node in ast.walk(ast.parse(source(script))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = {node.module} if isinstance(node, ast.ImportFrom) else {name.name for name in node.names}
                assert not modules & stems
