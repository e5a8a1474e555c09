"""Scripts above 300 lines are divided into chapters, and their docstrings end with a list of them."""

import ast
import re

import pytest
from conftest import ROOT

WITH_CHAPTERS = ["train_sam2_proper.py"]  # every script above 300 lines, extras/ included, belongs here


@pytest.mark.parametrize("script", WITH_CHAPTERS)
def test_the_docstring_lists_the_banners_in_their_order(script):
    source = (ROOT / script).read_text(encoding="utf-8")
    _, listed = ast.get_docstring(ast.parse(source)).split("Chapters:\n")
    titles = [re.match(r"    (\S.*?)  +\S", line)[1] for line in listed.splitlines()]
    banners = re.findall(r"^# ---- ([^:\n]+).* ----$", source, re.MULTILINE)
    banners = [banner.removesuffix(" ----") for banner in banners if not banner.startswith("end of ")]
    assert len(titles) >= 3 and titles == banners
