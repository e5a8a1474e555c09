"""Scripts above 300 lines are divided into chapters, and their docstrings end with a list of them.

| tests | subject |
|---|---|
| length | which scripts need chapters |
| list | the docstring lists the banners in their order |
| banners | one form in all files |
"""

import ast
import re

import pytest
from conftest import ROOT

FOLDERS = ("extras", "demo", "benchmarks")
PATHS = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
SCRIPTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PATHS)}
WITH_CHAPTERS = [name for name, source in SCRIPTS.items() if source.count("\n") > 300]


def test_scripts_above_300_lines_are_found():
    assert {"train_sam2_proper.py", "extras/track_video.py", "extras/sam_med3d_ich/dataloader.py"} <= {*WITH_CHAPTERS}


@pytest.mark.parametrize("script", WITH_CHAPTERS)
def test_the_docstring_lists_the_chapter_banners_in_order(script):
    source = SCRIPTS[script]
    _, listed = ast.get_docstring(ast.parse(source)).split("Chapters:\n")
    titles = [re.match(r"    (\S.*?)  +\S", line)[1] for line in listed.splitlines()]
    banners = re.findall(r"^# ---- ([^:\n]+).* ----$", source, re.MULTILINE)
    banners = [banner.removesuffix(" ----") for banner in banners if not banner.startswith("end of ")]
    assert len(titles) >= 3 and titles == banners


@pytest.mark.parametrize("script", SCRIPTS)
def test_chapter_banners_have_one_form(script):
    lines = re.findall(r"^# *[-=#]{3,}.*", SCRIPTS[script], re.MULTILINE)
    assert not [line for line in lines if not re.fullmatch(r"# ---- \S.* ----", line)]
