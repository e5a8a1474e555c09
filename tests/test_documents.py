"""The guide and the README say what is there: command lines, flags, files and settings."""

import ast
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_CFG, draw_pair
from hydra.errors import MissingConfigException
from sam2.build_sam import build_sam2

import compare_models
import download_dataset
import prepare_data
import test_my_image
import train_sam2_proper

SCRIPTS = {module.__name__: module for module in (
    download_dataset, prepare_data, train_sam2_proper, compare_models, test_my_image)}
DOCUMENTS = ["README.md", "SAM2_FINETUNING_GUIDE.md"]
# what the scripts write, or users bring, so that it need not be in the repository
WRITTEN = re.compile(r"checkpoints/sam2\.1_hiera_(tiny|small|base_plus|large)\.pt|data/(images|masks)/(train|val)/?|"
                     r"data/preview\.png|output/.*|demo/(data|output)(/.*)?|test_images/.*|Kvasir-SEG/|data/|output/|"
                     r"checkpoints/|venv/|(이름|NAME)_\w+\.(png|json)|compare_\d\.png")


def text(document):
    return (ROOT / document).read_text(encoding="utf-8")


def flags_of(module):
    """All flags that a script's parser knows, from its source."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    flags = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
             and re.fullmatch(r"--?[a-z][a-z-]*", node.value)}
    if module is train_sam2_proper:
        flags |= {"--" + name.replace("_", "-") for name in train_sam2_proper.CONFIG}
        flags |= {f"--no-{name.replace('_', '-')}" for name, _, kind, _ in train_sam2_proper.SETTINGS if kind is bool}
    return {flag for flag in flags if flag not in ("--proc",)}


def command_lines(document):
    """Every line of a code block that starts one of the scripts, without its comment."""
    for line in text(document).splitlines():
        line = line.strip()
        if found := re.match(r"(?:python|torchrun --nproc-per-node=\d+) (\S+?)\.py( .*)?$", line):
            if found[1] in SCRIPTS:
                yield found[1], shlex.split(found[2] or "", comments=True)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_line_parses(document, monkeypatch):
    lines = list(command_lines(document))
    assert len(lines) >= 5
    for script, arguments in lines:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        SCRIPTS[script].parse_args()  # exits if it does not


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_that_is_named_exists(document):
    known = set().union(*(flags_of(module) for module in SCRIPTS.values())) | {
        "--nproc-per-node", "--no-build-isolation", "--help", "--memory", "--final", "--repeats"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text(document)))
    assert named <= known, named - known


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_guide(script):
    guide = text("SAM2_FINETUNING_GUIDE.md")
    missing = [flag for flag in flags_of(SCRIPTS[script]) if not re.search(rf"(?<![\w-]){flag}(?![\w-])", guide)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists_or_is_written_by_a_script(document):
    named = set(re.findall(r"[`(]((?:[a-zA-Z_][\w.-]*/)+[\w.-]*|[\w-]+\.(?:py|md|txt|pt|png|yaml))[`)]",
                           text(document)))
    named |= set(re.findall(r"(?<= )(?:demo|benchmarks|tests)/[\w./-]+", text(document)))
    made_by_users = {"annotations.json", "rough.png"}
    sources = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in SCRIPTS.values())
    package = {name for name in named if name.startswith("configs/sam2.1/")}
    missing = [name for name in named - made_by_users - package
               if not (ROOT / name).exists() and not WRITTEN.fullmatch(name) and f'"{name}"' not in sources]
    assert not missing
    import sam2
    assert all((Path(sam2.__file__).parent / name).is_file() for name in package)


def test_what_scripts_write_is_named_in_their_source():
    sources = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS)
    for name in re.findall(r"`output/([\w.]+)`", text("SAM2_FINETUNING_GUIDE.md")):
        assert name in sources


def test_every_setting_that_is_quoted_is_that_of_config():
    quoted = re.findall(r'^"(\w+)": (.+),$', text("SAM2_FINETUNING_GUIDE.md"), re.MULTILINE)
    assert len(quoted) >= 8
    for name, value in quoted:
        assert train_sam2_proper.CONFIG[name] == ast.literal_eval(value), name


def test_every_message_that_the_guide_shows_is_in_a_script():
    sources = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS)
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings that go on in the next line
    shown = re.findall(r"^(?:오류|주의): (.*)$", text("SAM2_FINETUNING_GUIDE.md"), re.MULTILINE)
    assert len(shown) >= 7
    for message in shown:
        words = re.split(r"메모리가 부족합니다\. |창을 띄울 수 없습니다\. |"
                         r"\(?No module named 'sam2'\)?|sam2\.1_hiera_s |\(Cannot find.*?\)|"
                         r"'cuda'|"
                         r": cpu|checkpoints/\S+|small|\"x,y\"", message)
        longest = max(words, key=len).strip(" .():")
        assert longest.replace('"', '\\"') in sources or longest in sources, longest


def pitfall(number):
    """The Python code of a section of the guide's chapter 7."""
    section = text("SAM2_FINETUNING_GUIDE.md").split(f"### {number} ")[1].split("\n### ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_a_config_is_found_by_its_whole_name_only_as_the_guide_shows():
    short_name, whole_name = pitfall("7.3").strip().splitlines()
    with pytest.raises(MissingConfigException):
        exec(short_name, {"build_sam2": build_sam2})
    exec(whole_name, {"build_sam2": build_sam2})


def test_nothing_is_learnt_through_predict_and_something_through_features_as_the_guide_shows(weights):
    through_predict, through_features = pitfall("7.5").split("\n\n")
    predictor = train_sam2_proper.load_predictor(SMALL_CFG, weights, "cpu")
    predictor.set_image(draw_pair(0)[0])
    names = {"torch": torch, "predictor": predictor, "predict_masks": train_sam2_proper.predict_masks,
             "features": predictor._features, "sizes": predictor._orig_hw,
             "points": np.array([[40, 30]], np.float32), "labels": np.array([1])}
    with pytest.raises(RuntimeError, match="does not require grad"):
        exec(through_predict, names)
    exec(through_features, names)
    assert predictor.model.sam_mask_decoder.mask_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_inside_the_repository_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", text(document)):
        assert (ROOT / target).exists(), target
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().replace(" ", "-").lower()
                for line in text(document).splitlines() if line.startswith("#")}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text(document)):
        assert anchor in headings, anchor
