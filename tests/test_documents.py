"""The documents agree with the code.

| tests | subject |
|---|---|
| commands | every command line parses, every command names existing things |
| flags | named, explained, listed in tables of options, with their defaults |
| files | named files exist or are written by a script, links |
| messages | quoted messages, settings, prompts and Python examples |
| claims | torch's lowest version, the guide's pitfalls |
"""

import ast
import contextlib
import functools
import importlib
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import annotate
import convert_checkpoint
import export_onnx
import import_labels
import label_with_text
import numpy as np
import pytest
import segment_volume
import torch
import track_video
import train
import yaml
from conftest import ROOT, SMALL_CFG, draw_pair
from hydra.errors import MissingConfigException
from sam2.build_sam import build_sam2

import compare_models
import download_dataset
import prepare_data
import test_my_image
import train_sam2_proper

GUIDE, EXTRAS_GUIDE = "SAM2_FINETUNING_GUIDE.md", "extras/GUIDE.md"
DOCUMENTS = ["README.md", GUIDE, EXTRAS_GUIDE]
BENCHMARKS, CONTRIBUTING, WORKFLOW = "benchmarks/README.md", "CONTRIBUTING.md", ".github/workflows/ci.yml"
SECTIONS = {  # path of a script: the document that explains it, and the beginnings of its headings
    "download_dataset.py": (GUIDE, "2. 체크포인트", "3. 데이터"),
    "prepare_data.py": (GUIDE, "3. 데이터"),
    "train_sam2_proper.py": (GUIDE, "4. 파인튜닝"),
    "compare_models.py": (GUIDE, "5. 원본과 비교"),
    "test_my_image.py": (GUIDE, "6. 내 이미지에 쓰기"),
    "extras/annotate.py": (EXTRAS_GUIDE, "설치", "폴더 라벨링하기"),
    "extras/track_video.py": (EXTRAS_GUIDE, "설치", "영상에서 따라가기"),
    "extras/segment_volume.py": (EXTRAS_GUIDE, "설치", "CT와 MR에서 따라가기"),
    "extras/label_with_text.py": (EXTRAS_GUIDE, "설치", "단어나 상자로 라벨 만들기"),
    "extras/import_labels.py": (EXTRAS_GUIDE, "다른 도구의 라벨 가져오기"),
    "extras/convert_checkpoint.py": (EXTRAS_GUIDE, "Hugging Face 형식으로"),
    "extras/export_onnx.py": (EXTRAS_GUIDE, "ONNX로 내보내기"),
    "extras/sam_med3d_ich/train.py": (EXTRAS_GUIDE, "SAM-Med3D로 뇌 CT의 출혈 분할하기"),
}
SCRIPTS = dict(zip(SECTIONS, (
    download_dataset, prepare_data, train_sam2_proper, compare_models, test_my_image, annotate, track_video,
    segment_volume, label_with_text, import_labels, convert_checkpoint, export_onnx, train)))
SOURCES = "".join(path.read_text(encoding="utf-8") for folder in (".", "extras", "extras/sam_med3d_ich", "extras/demo")
                  for path in sorted((ROOT / folder).glob("*.py")))
# files whose names the scripts compose or a package chooses, and folders that appear when they run
WRITTEN = re.compile(r"(checkpoints|data|output|venv|Kvasir-SEG|demo/data|demo/output|output/comparison|output/kvasir|"
                     r"plots|to_data|"
                     r"output/my_(tracks|volumes)/이름|output/my_masks/폴더이름|extras/demo/output/ich|models/(florence2|grounding-dino)|"
                     r"data/(images|masks)/(train|val))/|checkpoints/sam2\.1_hiera_(small|base_plus)\.pt|"
                     r"(output/comparison/)?compare_1\.png|masks/00000\.png|training_summary_(\*|날짜_시각)\.json|"
                     r"processor_config\.json")
BROUGHT = ("annotations.json", "_annotations.coco.json", "2.jpg", "10.jpg", "test_images/dog.jpg", "이름.png",
           "sam_med3d_turbo.pth", "train/", "val/", "valid/", "test/", "data.yaml", "labels/", "images/", "masks/",
           "SegmentationClass/", "SegmentationObject/", "ImageSets/Segmentation/",
           "train/_annotations.coco.json")  # by users


def text(document):
    return (ROOT / document).read_text(encoding="utf-8")


def section(document, *headings):
    """The chapters of a document whose headings begin with one of `headings`."""
    chapters = re.split("^## ", text(document), flags=re.MULTILINE)  # no code block has such a line
    found = [chapter for chapter in chapters if chapter.startswith(headings)]
    assert len(found) == len(headings)
    return "".join(found)


@functools.cache
def help_of(script):
    """The output of --help: {flag: the block of lines that explains it}."""
    with mock.patch.object(sys, "argv", [script, "--help"]), mock.patch.dict(os.environ, COLUMNS="1000"), \
            contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        SCRIPTS[script].parse_args()
    blocks = re.findall(r"^  (-[^\n]*(?:\n    [^\n]*)*)", out.getvalue(), re.MULTILINE)
    return {flag: block for block in blocks for flag in re.findall(r"(?<![\w-])--?[a-z][\w-]*", block.split("  ")[0])
            if flag not in ("-h", "--help")}


def flags_in_source(path):
    """The flags of a script without parse_args(): those of demo/ and benchmarks/."""
    source = (ROOT / path).read_text(encoding="utf-8")
    shared = flags_in_source("benchmarks/study_recipes.py") if "study_recipes.make_parser" in source else set()
    return shared | set(re.findall(r'add_argument\("(--[\w-]+)"', source))


def code(document):
    """Every line of code in a document: fenced and indented blocks, and text between backticks.

    For the workflow: every command.
    """
    if document == WORKFLOW:
        jobs = yaml.safe_load(text(document))["jobs"].values()
        return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]
    joined = re.sub(r" *\\\n *", " ", text(document))
    fenced = re.findall(r"^```\w*\n(.*?)^```$", joined, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```\w*\n.*?^```$", "", joined, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (.*)$", prose, re.MULTILINE)
    inline = [re.sub(r"\s*\n\s*", " ", span) for span in re.findall(r"`([^`]+)`", prose)]
    return [line.strip() for block in fenced for line in block.splitlines()] + indented + inline


def command_lines(document):
    """Every command of a document that starts a Python file, without its comment: (path, arguments)."""
    for line in code(document):
        if found := re.match(r"(?:\w+=\S+ )?(?:python|torchrun --nproc-per-node=\d+) (\S+\.py)( .*)?$", line):
            yield found[1], shlex.split(found[2] or "", comments=True)


def options_in(chapter):
    """The rows of its tables of options: {heading of the column: cell}; the last one explains the options."""
    for table in re.findall(r"^\| 옵션 .*\n\|[-|]+\n(?:\|.*\n)+", chapter, re.MULTILINE):
        heading, _, *rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines()]
        yield from ({column.split()[0]: cell for column, cell in zip(heading, row)} for row in rows)


def named_flags(words):
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9_-]*(?<!-)", words))


@pytest.mark.parametrize("document", [*DOCUMENTS, BENCHMARKS, WORKFLOW])
def test_every_command_line_in_a_document_parses(document, monkeypatch):
    lines = list(command_lines(document))
    assert len(lines) >= (4 if document == WORKFLOW else 10)
    monkeypatch.setattr(train_sam2_proper, "load_last", lambda _: {"settings": train_sam2_proper.CONFIG})  # of --resume
    for path, arguments in lines:
        if path in SCRIPTS:
            monkeypatch.setattr(sys, "argv", [path, *arguments])
            SCRIPTS[path].parse_args()  # exits if it does not parse
        else:
            assert (ROOT / path).is_file(), path
            assert named_flags(" ".join(arguments)) <= flags_in_source(path), path


@pytest.mark.parametrize("document", [GUIDE, EXTRAS_GUIDE])
def test_flags_after_the_name_of_a_script_belong_to_that_script(document):
    scripts = {Path(script).name: script for script in SCRIPTS}
    found = [match for line in code(document) if (match := re.match(r"(\w+\.py) (-.*)", line))]
    assert len(found) >= 3
    for match in found:
        assert named_flags(match[2]) <= help_of(scripts[match[1]]).keys(), match[0]


@pytest.mark.parametrize("document", [*DOCUMENTS, BENCHMARKS, CONTRIBUTING, WORKFLOW])
def test_make_pip_and_hf_commands_name_existing_targets_files_and_repositories(document):
    targets = re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE)
    lines = code(document)
    made = [target for line in lines for target in re.findall(r"^make ([\w-]+)", line)]
    assert made and set(made) <= set(targets), set(made) - set(targets)
    for line in lines:
        if re.match("(sudo )?(pip install|sh|venv/bin/python -m pip install) ", line):
            assert all((ROOT / name).is_file() for name in re.findall(r"(?:-r|sh) (\S+)", line)), line
        if found := re.match(r"hf download (\S+) --local-dir models/(\S+)$", line):
            assert label_with_text.REPOSITORIES[found[2]] == found[1]


def test_the_ci_workflow_runs_the_test_files_that_the_makefile_names():
    names = re.search(r"^SCRIPT_TESTS := \$\(foreach name,([\w ]+),", text("Makefile"), re.MULTILINE)[1].split()
    command, = (line for line in code(WORKFLOW) if "-m pytest" in line)
    assert command.split()[3:] == [f"tests/test_{name}.py" for name in names]
    assert all((ROOT / name).is_file() for name in command.split()[3:])


@pytest.mark.parametrize("document", [*DOCUMENTS, BENCHMARKS, CONTRIBUTING])
def test_every_flag_that_a_document_names_exists(document):
    known = {flag for script in SCRIPTS for flag in help_of(script)} | {
        "--nproc-per-node", "--no-build-isolation", "--help", "--local-dir"}
    known = known.union(*(flags_in_source(path) for path, _ in command_lines(document) if path not in SCRIPTS))
    named = {flag for flag in named_flags(text(document)) if flag.startswith("--")}
    assert named <= known, named - known


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_in_the_chapter_of_its_script(script):
    missing = help_of(script).keys() - named_flags(section(*SECTIONS[script]))
    assert not missing


@pytest.mark.parametrize("document", [GUIDE, EXTRAS_GUIDE])
def test_tables_of_options_list_only_flags_of_their_scripts(document):
    headings = {script: headings for script, (own, *headings) in SECTIONS.items() if own == document}
    rows = [(heading, row) for heading in set(sum(headings.values(), []))
            for row in options_in(section(document, heading))]
    assert len(rows) >= 40
    for heading, row in rows:
        known = {flag for script in headings if heading in headings[script] for flag in help_of(script)}
        assert named_flags(row["옵션"]) <= known, (heading, row)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_default_in_a_table_of_options_equals_that_of_the_parser(script):
    defaults = {flag: re.findall(r"기본: ([^()]+)\)", block)[-1:] for flag, block in help_of(script).items()}
    for row in options_in(section(*SECTIONS[script])):
        flags = [flag for flag in re.findall(r"`(--[\w-]+)", row["옵션"]) if flag in defaults]
        actual = [as_value(default) for flag in flags for default in defaults[flag]]
        if "기본" in row:  # a separate column that lists all defaults
            named = [as_value(default) for default in row["기본"].split(", ") if default not in ("", "끔")]
            assert named == [default for default in actual if default != "None"], row
        elif flags:
            named = [as_value(default) for found in re.findall(r"\(기본 ([^():]+)\)", [*row.values()][-1])
                     for default in found.split(", ")]
            assert set(named) <= set(actual), (row, actual)


def as_value(words):
    """A number, if it is one: 1e-4 is 0.0001."""
    try:
        return float(words)
    except ValueError:
        return words.strip("`")


@pytest.mark.parametrize("document", [*DOCUMENTS, BENCHMARKS, CONTRIBUTING])
def test_every_file_that_a_document_names_exists_or_is_written_by_a_script(document):
    suffixes = "py|md|txt|pt|pth|png|jpg|yaml|json|csv|mp4|nii\\.gz|safetensors"
    named = set(re.findall(rf"[`(]((?:[\w.*-]+/)*(?:[\w.*-]+/|[\w.*+-]+\.(?:{suffixes})))[`)]", text(document)))
    named |= {name for line in re.findall(r"^[├└]── (.*?)(?:  |$)", text(document), re.MULTILINE)
              for name in line.split(", ")}
    assert len(named) >= (10 if document in DOCUMENTS else 4)
    package = {name for name in named if name.startswith("configs/sam2.1/")}
    missing = [name for name in named - package if not (is_there(name, document) or is_written(name)
                                                        or name in BROUGHT)]
    assert not missing
    import sam2
    assert all((Path(sam2.__file__).parent / name).is_file() for name in package)


def is_there(name, document):
    """Whether a file exists relative to the repository's root, the document's folder or a folder beside it."""
    beside = (ROOT / document).parent
    return any((folder / name).exists() for folder in (ROOT, beside, beside / "sam_med3d_ich"))


def is_written(name):
    """Whether a script's source contains a file's name in quotes, or the part after an image's or a volume's name."""
    file = re.sub("^(이름|NAME)_", "}_", Path(name).name)
    quoted = [f'{file}"', f'"{file[2:]}"'] if file.startswith("}_") else [f'"{file}"']
    return WRITTEN.fullmatch(name) or not name.endswith("/") and any(words in SOURCES for words in quoted)


def test_the_prompts_json_shown_in_the_guide_is_read(tmp_path):
    shown = re.search(r"```json\n(.*?)```", text(EXTRAS_GUIDE), re.DOTALL)[1]
    (tmp_path / "prompts.json").write_text(shown)
    assert track_video.read_prompts(tmp_path / "prompts.json").keys() == {
        (entry["frame"], entry["object"]) for entry in json.loads(shown)}


@pytest.mark.parametrize("document", [GUIDE, EXTRAS_GUIDE])
def test_every_import_of_the_python_examples_exists(document):
    imported = 0
    for block in re.findall(r"```python\n(.*?)```", text(document), re.DOTALL):
        if block.startswith('"'):  # settings, see below
            continue
        for node in ast.walk(ast.parse(block)):
            for name in node.names if isinstance(node, ast.ImportFrom) else ():
                imported += 1
                assert hasattr(importlib.import_module(node.module), name.name), (node.module, name.name)
    assert imported


def test_every_message_that_the_extras_guide_quotes_is_in_a_script():
    quoted = re.findall(r'\*\*"(.+?)"\*\*', text(EXTRAS_GUIDE))
    assert len(quoted) >= 4
    joined = re.sub(r'"\s*\n\s*f?"', "", SOURCES)  # strings that go on in the next line
    for message in quoted:
        assert message in joined, message


def test_every_output_file_that_the_guide_names_is_named_in_a_script():
    sources = "".join((ROOT / script).read_text(encoding="utf-8") for script in SCRIPTS if "/" not in script)
    for name in re.findall(r"`output/([\w.]+)`", text("SAM2_FINETUNING_GUIDE.md")):
        assert name in sources


def test_every_setting_quoted_in_the_guide_equals_that_of_config():
    quoted = re.findall(r'^"(\w+)": (.+),$', text("SAM2_FINETUNING_GUIDE.md"), re.MULTILINE)
    assert len(quoted) >= 8
    for name, value in quoted:
        assert train_sam2_proper.CONFIG[name] == ast.literal_eval(value), name


def test_the_guide_shows_the_flags_of_each_recipe(monkeypatch):
    shown, = (line for line in code(GUIDE) if line.startswith("--dice-weight") and "--save-every" in line)

    def settings(*flags):
        monkeypatch.setattr(sys, "argv", ["train_sam2_proper.py", *flags])
        return {**vars(train_sam2_proper.parse_args()), "recipe": None}

    assert settings(*shown.split()) == settings("--recipe", "improved")
    assert settings(*shown.split(), "--encoder", "full", "--prompt", "any") == settings("--recipe", "strongest")


def test_every_message_that_the_guide_shows_is_in_a_script():
    sources = "".join((ROOT / script).read_text(encoding="utf-8") for script in SCRIPTS if "/" not in script)
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings that go on in the next line
    shown = re.findall(r"^(?:오류|주의): (.*)$", text("SAM2_FINETUNING_GUIDE.md"), re.MULTILINE)
    assert len(shown) >= 7
    for message in shown:
        words = re.split(r"메모리가 부족합니다\. |창을 띄울 수 없습니다\. |, --web으로 브라우저에 띄우세요 |"
                         r"\(?No module named 'sam2'\)?|sam2\.1_hiera_s |\(\[Errno 2\].*?\)|"
                         r"'cuda'|"
                         r": cpu|checkpoints/\S+|small|\"x,y\"", message)
        longest = max(words, key=len).strip(" .():")
        assert longest.replace('"', '\\"') in sources or longest in sources, longest


def test_torch_is_new_enough_for_what_the_documents_promise_about_checkpoints():
    """Versions before the last fix run code or corrupt memory despite weights_only=True."""
    lowest = {name: tuple(map(int, version.split("."))) for name, version in
              re.findall(r"^(torch|torchvision)>=([\d.]+)$", text("requirements.txt"), re.MULTILINE)}
    assert lowest["torch"] >= (2, 10, 0)
    assert lowest["torchvision"][1] == lowest["torch"][1] + 15  # released with it: 0.25 with 2.10
    named = ".".join(map(str, lowest["torch"][:2]))
    assert f"torch {named}\n  or newer" in text("SECURITY.md") and f"torch는 {named} 이상" in text(GUIDE)


def test_no_message_has_a_korean_particle_right_after_a_value():
    """Whether 은 or 는 is right depends on how the value ends, which the code does not know."""
    block = text("train_sam2_proper.py").split("# ---- shared block")[1]
    kept = set(particles_after_values(block.partition("\n")[2]))
    for folder in (".", "extras", "extras/sam_med3d_ich", "extras/demo", "demo"):
        for path in (ROOT / folder).glob("*.py"):
            assert set(particles_after_values(path.read_text(encoding="utf-8"))) <= kept, path


def particles_after_values(source):
    """The texts of f-strings that begin, right after a value in braces, with a particle that has two forms."""
    for node in ast.walk(ast.parse(source)):
        for value, after in zip(node.values, node.values[1:]) if isinstance(node, ast.JoinedStr) else ():
            if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant) and re.match(
                    r"[\"']?(은|는|이|가|을|를|과|와|로|으로|이나|나|이라|라)(?![가-힣(])", after.value):
                yield after.value


def pitfall(number):
    """The Python code of a section of the guide's chapter 7."""
    section = text("SAM2_FINETUNING_GUIDE.md").split(f"### {number} ")[1].split("\n### ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_a_config_opens_only_by_its_full_name_as_the_guide_shows():
    short_name, whole_name = pitfall("7.3").strip().splitlines()
    with pytest.raises(MissingConfigException):
        exec(short_name, {"build_sam2": build_sam2})
    exec(whole_name, {"build_sam2": build_sam2})


def test_gradients_flow_through_predict_masks_but_not_through_predict_as_the_guide_shows(weights):
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


@pytest.mark.parametrize("document", [*DOCUMENTS, BENCHMARKS, CONTRIBUTING, "CHANGELOG.md"])
def test_links_inside_the_repository_have_a_target(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(document)):
        assert ((ROOT / document).parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text(document)):
        assert anchor in anchors((ROOT / document).parent / target if target else ROOT / document), anchor


def anchors(path):
    """The anchors that GitHub makes from a document's headings."""
    return {re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().replace(" ", "-").lower()
            for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")}
