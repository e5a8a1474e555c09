"""compare_models.py, run as a user runs it.

| tests | subject |
|---|---|
| comparison | figures and tables agree, IoU equals sam2's own, unreadable images, empty masks |
| measures | bootstrap interval, boundary F, size classes |
| classes | one row for each class, invalid values and files |
| report | report.html: content, escaping, sorting and filtering in a browser |
"""

import base64
import html.parser
import json
import os
import re
import signal

import cv2
import numpy as np
import pytest
import torch
from conftest import (
    SMALL_CFG,
    assert_fails_in_one_line,
    display_width,
    draw_pair,
    read_rows,
    run,
    save_small_model,
    signal_at,
    write_image,
)
from scipy import stats
from selenium.webdriver.support.wait import WebDriverWait

import compare_models


def compare(folder, weights, *arguments, **options):
    return run("compare_models.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--device", "cpu",
               *arguments, cwd=folder, **options)


def test_the_printed_box_the_summary_and_the_table_show_the_same_means(trained, weights):
    folder, _ = trained
    done = compare(folder, weights)
    rows = read_rows(folder / "output/comparison/per_image.csv")
    measures = ["original_iou", "finetuned_iou", "original_dice", "finetuned_dice", "original_boundary_f",
                "finetuned_boundary_f"]
    assert list(rows[0]) == ["image", "object", *measures, "area", "size"]
    assert [row["image"] for row in rows] == [f"pair_{number}.png" for number in range(100, 104)]
    means = {name: np.mean([float(row[name]) for row in rows]) for name in measures}

    summary = json.loads((folder / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert summary["num_images"] == summary["num_objects"] == 4
    assert summary["prompt"] == "point" and summary["device"] == "cpu"
    assert summary["difference_pp"] == pytest.approx(100 * (means["finetuned_iou"] - means["original_iou"]))
    for name, mean in means.items():
        assert summary[name] == pytest.approx(mean) and 0 <= mean <= 1
    assert sum(group["num_objects"] for group in summary["by_size"].values()) == 4 and "by_class" not in summary

    box = done.stdout[done.stdout.index("┌"):done.stdout.index("┘") + 1].splitlines()
    assert len({display_width(line) for line in box}) == 1
    shown = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", "\n".join(box))]
    assert shown == [round(100 * means["original_iou"], 2), round(100 * means["finetuned_iou"], 2),
                     round(summary["difference_pp"], 1), *(round(end, 1) for end in summary["difference_pp_95"])]

    pictures = sorted((folder / "output/comparison").glob("compare_*.png"))
    assert [path.name for path in pictures] == [f"compare_{number}.png" for number in range(1, 5)]
    for path in [*pictures, *(folder / "output/comparison" / name for name in compare_models.CHARTS)]:
        assert cv2.imread(str(path)).std() > 10
    assert "한 번만 인코딩" in done.stdout


def test_iou_is_that_of_the_highest_scored_mask_for_the_middle_click(trained, weights):
    """Computed again here, with sam2's own predictor."""
    folder, _ = trained
    compare(folder, weights, "--output-dir", "again")
    predictor = compare_models.load_predictor(SMALL_CFG, folder / "output/sam2_best.pt", "cpu")
    for row in read_rows(folder / "again/per_image.csv"):
        image = cv2.imread(str(folder / "data/images/val" / row["image"]))[..., ::-1].copy()
        gt_mask = cv2.imread(str(folder / "data/masks/val" / row["image"]), cv2.IMREAD_GRAYSCALE) > 127
        foreground = np.argwhere(gt_mask)
        y, x = foreground[len(foreground) // 2]
        predictor.set_image(image)
        masks, scores, _ = predictor.predict(np.array([[x, y]]), np.array([1]), multimask_output=True)
        best = masks[int(np.argmax(scores))] > 0.5
        assert float(row["finetuned_iou"]) == pytest.approx(
            (best & gt_mask).sum() / (best | gt_mask).sum(), abs=1e-5)


def test_the_best_iou_that_training_reports_equals_that_of_the_comparison(trained, weights):
    folder, done = trained
    compared = compare(folder, weights, "--output-dir", "same")
    summary = json.loads((folder / "same/summary.json").read_text(encoding="utf-8"))
    training = json.loads((folder / "output/training_summary.json").read_text(encoding="utf-8"))
    assert summary["finetuned_iou"] == training["best_iou"]
    shown = re.search(r"파인튜닝 SAM2:\s+([\d.]+%)", compared.stdout)[1]
    assert f"검증 최고 IoU {shown}" in done.stdout


def test_a_bare_state_dict_opens_and_flags_limit_the_images_and_figures(trained, weights):
    folder, _ = trained
    torch.save(torch.load(folder / "output/sam2_best.pt", weights_only=True)["model"], folder / "bare.pt")
    done = compare(folder, weights, "--finetuned", "bare.pt", "--num-images", 2, "--num-visualize", 1,
                   "--prompt", "box", "--output-dir", "bare")
    summary = json.loads((folder / "bare/summary.json").read_text(encoding="utf-8"))
    assert summary["num_images"] == len(read_rows(folder / "bare/per_image.csv")) == 2 and summary["prompt"] == "box"
    assert len(list((folder / "bare").glob("compare_*.png"))) == 1
    assert "이미지 2장, 객체 2개, 프롬프트 box" in done.stdout


def test_models_with_different_encoders_are_encoded_separately(trained, weights, tmp_path):
    folder, _ = trained
    other = save_small_model(tmp_path / "other.pt", seed=1)
    done = compare(folder, weights, "--finetuned", other, "--output-dir", tmp_path)
    assert "모델마다 인코딩" in done.stdout
    reverse = tmp_path / "reverse"
    compare(folder, other, "--finetuned", weights, "--output-dir", reverse)
    for one, two in zip(read_rows(tmp_path / "per_image.csv"), read_rows(reverse / "per_image.csv")):
        assert one["original_iou"] == two["finetuned_iou"] and one["finetuned_iou"] == two["original_iou"]


def test_a_missing_finetuned_model_names_the_training_script(data, weights):
    assert_fails_in_one_line(compare(data, weights, code=1), "output/sam2_best.pt", "train_sam2_proper.py")


def test_an_unreadable_image_is_named(data, weights):
    (data / "data/images/val/pair_101.png").write_bytes(b"broken")
    done = compare(data, weights, "--finetuned", weights, code=1)
    assert_fails_in_one_line(done, "pair_101.png")


def test_empty_masks_are_skipped_and_counted(data, weights):
    write_image(data / "data/masks/val/pair_100.png", np.zeros((60, 80), np.uint8))
    done = compare(data, weights, "--finetuned", weights)
    assert "뺀 이미지: 1장" in done.stdout and len(read_rows(data / "output/comparison/per_image.csv")) == 3
    assert "비교 그림 3장" in done.stdout and len(list((data / "output/comparison").glob("compare_*.png"))) == 3
    compare(data, weights, "--finetuned", weights, "--num-visualize", 2)  # the first would have been the empty one
    assert len(list((data / "output/comparison").glob("compare_*.png"))) == 2


def test_ctrl_c_ends_in_one_line(data, weights):
    done = run("compare_models.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--finetuned", weights,
               "--device", "cpu", "--num-visualize", 0, cwd=data, code=1, before=signal_at("인코딩", signal.SIGINT))
    assert_fails_in_one_line(done, "중단했습니다")
    assert not (data / "output/comparison").exists()


# ----------------------------------------------------------------------------- measures

def test_the_confidence_interval_equals_scipys_bootstrap_over_images():
    rng = np.random.default_rng(1)
    rows = [{"image": f"{image}.png", "original_iou": before, "finetuned_iou": before + rng.normal(0.1, 0.2)}
            for image in range(30) for before in rng.random(rng.integers(1, 6))]
    own = compare_models.difference(rows)
    gains, counts = np.zeros(30), np.zeros(30)
    for row in rows:
        gains[int(row["image"][:-4])] += 100 * (row["finetuned_iou"] - row["original_iou"])
        counts[int(row["image"][:-4])] += 1
    low, high = stats.bootstrap(
        (gains, counts), lambda gains, counts, axis: gains.sum(axis) / counts.sum(axis), paired=True,
        n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)).confidence_interval
    assert own["difference_pp"] == pytest.approx(gains.sum() / counts.sum()) and high - low > 5
    assert own["difference_pp_95"] == pytest.approx([low, high], abs=0.15)  # two different sets of 10,000 draws
    assert own == compare_models.difference(rows)


def test_one_image_has_no_confidence_interval():
    rows = [{"image": "a.png", "original_iou": 0.5, "finetuned_iou": 0.7}] * 3
    assert compare_models.difference(rows)["difference_pp_95"] is None
    assert "+20.0%p  " in compare_models.result_box(0.5, 0.7)
    assert "-20.0%p (95%: -31.2 … -9.5)" in compare_models.result_box(0.7, 0.5, [-31.16, -9.52])


def square(top, left, side, shape=(10, 10)):
    mask = np.zeros(shape, bool)
    mask[top:top + side, left:left + side] = True
    return mask


def test_boundary_f_equals_the_value_computed_by_hand():
    """A 3 x 3 square has a ring of 12 boundary pixels; moved by 2, 8 of them lie within 1 pixel of the other ring."""
    assert compare_models.find_boundary(square(2, 2, 3)).sum() == 12
    assert compare_models.calculate_boundary_f(square(2, 4, 3), square(2, 2, 3)) == pytest.approx(8 / 12)
    large = square(20, 20, 30, (600, 800))  # diagonal 1000: tolerance 8
    assert compare_models.calculate_boundary_f(square(28, 20, 30, (600, 800)), large) == 1
    assert compare_models.calculate_boundary_f(square(60, 60, 30, (600, 800)), large) == 0


def test_boundary_f_is_1_if_no_mask_has_a_boundary_and_0_if_only_one_has():
    nothing, everything = np.zeros((10, 10), bool), np.ones((10, 10), bool)
    assert compare_models.calculate_boundary_f(nothing, nothing) == 1
    assert compare_models.calculate_boundary_f(everything, everything) == 1
    assert compare_models.calculate_boundary_f(nothing, square(2, 2, 3)) == 0
    assert compare_models.calculate_boundary_f(square(2, 2, 3), nothing) == 0


def test_boundary_f_equals_that_of_davis():
    """DAVIS dilates each boundary by a disk; at the image's last row and column only the neighbor inside counts."""
    rng = np.random.default_rng(0)
    for height, width in ((1, 40), (60, 3), (90, 130), (300, 200)):
        for _ in range(5):
            masks = [cv2.blur(rng.random((height, width)), (9, 9)) > 0.5 for _ in range(2)]
            radius = int(np.ceil(0.008 * np.hypot(height, width)))
            offsets = np.arange(-radius, radius + 1)
            disk = np.uint8(offsets**2 + offsets[:, None]**2 <= radius**2)
            edges = [compare_models.find_boundary(mask) for mask in masks]
            near = [cv2.dilate(np.uint8(edge), disk) > 0 for edge in edges]
            precision, recall = near[1][edges[0]].mean(), near[0][edges[1]].mean()
            assert compare_models.calculate_boundary_f(*masks) == pytest.approx(
                2 * precision * recall / (precision + recall or 1))


def test_size_classes_are_those_of_coco():
    masks = np.zeros((4, 100, 100), bool)
    for mask, area in zip(masks, (1023, 1024, 9215, 9216)):
        mask.flat[:area] = True
    results = {"original": (masks, None), "fine-tuned": (masks, None)}
    rows = compare_models.measure("a.png", [1, 2, 3, 4], masks, results, {})
    assert [row["size"] for row in rows] == ["small", "medium", "medium", "large"]
    assert [row["area"] for row in rows] == [1023, 1024, 9215, 9216]


# ----------------------------------------------------------------------------- classes

def add_classes(folder, classes):
    """Make masks of 1000 * class + number: the ellipse is object 1 of class 1, a corner object 2 of class 12."""
    for path in (folder / "data/masks/val").iterdir():
        labels = np.where(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127, 1001, 0).astype(np.uint16)
        labels[:12, :12] = 12002
        write_image(path, labels)
    (folder / "data/classes.json").write_text(json.dumps(classes), encoding="utf-8")


def test_the_comparison_reports_each_class_separately(data, weights):
    add_classes(data, {"1": "용종", "2": "unused", "12": "=tool"})
    done = compare(data, weights, "--finetuned", weights)
    rows = read_rows(data / "output/comparison/per_image.csv")
    assert list(rows[0])[-1] == "class" and [row["class"] for row in rows] == ["용종", "'=tool"] * 4
    summary = json.loads((data / "output/comparison/summary.json").read_text(encoding="utf-8"))
    assert {name: means["num_objects"] for name, means in summary["by_class"].items()} == {
        "용종": 4, "unused": 0, "=tool": 4}
    for name, cell in (("용종", "용종"), ("=tool", "'=tool")):
        mean = np.mean([float(row["original_iou"]) for row in rows if row["class"] == cell])
        assert summary["by_class"][name]["original_iou"] == pytest.approx(mean)
        assert f"  {name}: 객체 4개, IoU {mean:.2%} → " in done.stdout
    assert "  unused: 객체 0개, IoU -, Dice -, Boundary F -" in done.stdout
    page = (data / "output/comparison/report.html").read_text(encoding="utf-8")
    assert "<td>클래스 용종<td>4<td>" in page and "<td>클래스 unused<td>0<td>-" in page
    assert "pair_100.png 12002 =tool" in page


def test_a_mask_value_whose_class_is_not_in_classes_json_is_refused(data, weights):
    add_classes(data, {"1": "polyp", "2": "tool"})
    done = compare(data, weights, "--finetuned", weights, code=1)
    assert_fails_in_one_line(done, "pair_100.png", "12002", "classes.json", "1, 2")


@pytest.mark.parametrize("value, classes", [(1, {1: "polyp"}), (1000, {1: "polyp"}), (2001, {1: "polyp", 2: ""})])
def test_mask_values_that_do_not_encode_a_named_class_and_a_number_are_refused(tmp_path, value, classes):
    write_image(tmp_path / "mask.png", np.array([[0, 1001, value]], np.uint16))
    with pytest.raises(SystemExit, match=f"mask.png: 값 {value}의"):
        compare_models.has_objects(tmp_path / "mask.png", classes)
    assert compare_models.has_objects(tmp_path / "mask.png", {})


@pytest.mark.parametrize("content", ["", "[1]", '{"polyp": 1}', "\xff"])
def test_an_invalid_classes_json_is_named(tmp_path, content):
    (tmp_path / "classes.json").write_text(content, encoding="latin-1")
    with pytest.raises(SystemExit, match="classes.json.*polyp"):
        compare_models.read_classes(tmp_path / "masks/val")


# ----------------------------------------------------------------------------- the report

class Page(html.parser.HTMLParser):
    """The elements of a page, [(tag, attributes)], and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def names(self, tag):
        return [attributes["data-name"] for name, attributes in self.elements
                if name == tag and "data-name" in attributes and "hidden" not in attributes]


HOSTILE = '"><script>alert(1)<&$.png' if os.name == "posix" else "a&'$iou.png"  # Windows forbids < > "


@pytest.fixture(scope="module")
def reported(tmp_path_factory, weights):
    """The output folder of a comparison of four images: one with a hostile name, one with a thousand columns."""
    folder = tmp_path_factory.mktemp("reported")
    for number, name in enumerate([HOSTILE, "가_1.png", "가_2.png", "wide.png"]):
        image, mask = draw_pair(number, 50, 1000) if name == "wide.png" else draw_pair(number)
        write_image(folder / "data/images/val" / name, image)
        write_image(folder / "data/masks/val" / name, mask)
    other = save_small_model(folder / "other.pt", seed=1)
    done = compare(folder, weights, "--finetuned", other, "--prompt", "mixed", "--num-visualize", 0)
    assert "report.html" in done.stdout
    return folder / "output/comparison"


def test_the_report_is_one_self_contained_file_and_escapes_names(reported):
    text = (reported / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 1 and f"{HOSTILE} 1" in page.text
    assert set(page.names("tr")) == set(page.names("figure")) == {
        f"{name} 1" for name in (HOSTILE, "가_1.png", "가_2.png", "wide.png")}
    sources = [attributes["src"] for _, attributes in page.elements if "src" in attributes]
    assert all(source.startswith("data:image/") for source in sources) and "http" not in text and "@import" not in text
    assert {attributes["href"][0] for _, attributes in page.elements if "href" in attributes} == {"#"}
    pictures = [np.frombuffer(base64.b64decode(source.split(",")[1]), np.uint8) for source in sources]
    shapes = [cv2.imdecode(picture, cv2.IMREAD_COLOR).shape for picture in pictures]
    assert len(shapes) == 3 + 4 and all(max(height, (width - 8) / 2) == 512 for height, width, _ in shapes[3:])


def test_the_report_shows_the_numbers_of_the_summary_and_of_the_table(reported):
    text = Page((reported / "report.html").read_text(encoding="utf-8")).text
    summary = json.loads((reported / "summary.json").read_text(encoding="utf-8"))
    low, high = summary["difference_pp_95"]
    assert f"차이 {summary['difference_pp']:+.1f}%p (95%: {low:+.1f} … {high:+.1f})" in text
    assert f"평균 IoU {summary['original_iou']:.2%} → {summary['finetuned_iou']:.2%}" in text
    for values in (summary, *read_rows(reported / "per_image.csv")):
        for measure in ("iou", "dice", "boundary_f"):
            before, after = (float(values[f"{model}_{measure}"]) for model in ("original", "finetuned"))
            assert f"{before:.2%} → {after:.2%}" in text
    assert "객체 4개 가운데 4개" in text


def test_a_report_of_one_image_has_no_interval_and_a_class_may_have_the_name_of_a_size():
    row = {f"{model}_{measure}": 0.5 for model in compare_models.MODELS for measure in compare_models.MEASURES}
    rows = [{"image": "a.png", "object": 1001, **row, "area": 50, "size": "small", "class": "large"}]
    summary = {"num_images": 1, **compare_models.mean_measures(rows), **compare_models.difference(rows),
               "by_size": {name: compare_models.mean_measures(rows, size=name) for name in compare_models.SIZES},
               "by_class": {"large": compare_models.mean_measures(rows)}, "prompt": "point", "image_size": 1024,
               "device": "cpu", "original": "a.pt", "finetuned": "b.pt"}
    text = compare_models.make_report(rows, summary, {}, [])
    assert "<td>크기 large<td>0<td>-" in text and "<td>클래스 large<td>1<td>50.00%" in text
    assert "이미지가 하나라" in text and "bootstrap" not in text
    text = compare_models.make_report(rows, summary | {"difference_pp_95": [-1, 2]}, {}, [])
    assert "(95%: -1.0 … +2.0)" in text and "bootstrap" in text


def test_the_report_sorts_and_filters_in_a_browser(reported, browser):
    def shown(names):
        found = [[item.get_attribute("data-name") for item in browser.find_elements("css selector", f"{tag}[data-name]")
                  if item.is_displayed()] for tag in ("tr", "figure")]
        return found == [names, names]

    rows = read_rows(reported / "per_image.csv")
    after = {f"{row['image']} 1": float(row["finetuned_iou"]) for row in rows}
    gain = {f"{row['image']} 1": after[f"{row['image']} 1"] - float(row["original_iou"]) for row in rows}
    worst, loss, wait = sorted(after, key=after.get), sorted(gain, key=gain.get), WebDriverWait(browser, 60)
    browser.get((reported / "report.html").as_uri())
    assert shown(worst)
    for link, names in (("많이 나아진 순서", loss[::-1]), ("많이 나빠진 순서", loss), ("나쁜 순서", worst),
                        ("이름 순서", sorted(after))):
        browser.find_element("link text", link).click()
        wait.until(lambda _, names=names: shown(names), link)
    browser.find_element("tag name", "input").send_keys("가_")
    wait.until(lambda _: shown(["가_1.png 1", "가_2.png 1"]))


def test_the_report_shows_thin_objects_of_large_images():
    """A crack of one pixel, in a part of the image that is shown at a quarter of its size."""
    image, crack = np.full((2100, 2100, 3), 128, np.uint8), np.zeros((1, 2100, 2100), bool)
    crack[0, np.arange(50, 2050), np.arange(50, 2050)] = True
    prompts = np.full((1, 1, 2), -1), np.full((1, 1), -1)
    results = {"original": (crack, prompts), "fine-tuned": (~crack, prompts)}
    picture = compare_models.draw_picture(image, crack, results, 0)
    pixels = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).astype(int)
    blue, green, red = np.moveaxis(pixels, 2, 0)
    for left in (0, 520):  # the outline of the ground truth runs from corner to corner of both panels
        is_truth = ((green - blue > 60) & (green - red > 60))[:, left:left + 512]
        assert is_truth.any(1).mean() > 0.9 and is_truth.any(0).mean() > 0.9
    assert (np.abs(pixels - 128).max(2)[100:200, 350:500] < 10).all() and (blue - red)[100:200, 870:1020].min() > 40


def test_the_report_of_many_objects_shows_the_worst_and_the_largest_changes(monkeypatch):
    monkeypatch.setattr(compare_models, "draw_picture", lambda image, masks, results, number: f"{image} {number}")
    rng, rows, pictures = np.random.default_rng(0), [], {}
    for image in range(40):
        rows += [{"original_iou": before, "finetuned_iou": after} for before, after in rng.random((7, 2))]
        pictures = compare_models.update_pictures(pictures, rows, image, [None] * 7, None, 9)
        assert len(pictures) == (7 if image == 0 else 9)
    assert all(picture == f"{index // 7} {index % 7}" for index, picture in pictures.items())
    order = sorted(range(280), key=lambda index: compare_models.gain(rows[index]))
    worst = sorted(range(280), key=lambda index: rows[index]["finetuned_iou"])
    assert {*order[:3], *order[-3:], *worst[:3]} <= pictures.keys()
    assert not compare_models.update_pictures({}, rows, 39, [None] * 7, None, 0)
