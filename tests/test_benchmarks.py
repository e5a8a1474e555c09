"""The benchmarks run and print their tables. The measured values are not checked.

| tests | subject |
|---|---|
| study_recipes.py, study_sizes.py, study_annotation.py | a row for each recipe, size or variant |
| bench_training.py, bench_compare.py, bench_window.py | ratios and seconds |
| bench_onnx.py | sizes, ratios, IoU |
"""

import re

from conftest import ROOT, SMALL_CFG, run


def test_the_study_of_recipes_prints_a_row_for_each_recipe(data, weights):
    done = run("benchmarks/study_recipes.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--passes", 16,
               "--seeds", 2, "--workers", 1, "--only",
               "original;reference;focal (x 20) + Dice;mixed;flips;mixed, neck too",
               "--cache-dir", "features", cwd=data)
    head, columns, *rows = done.stdout.strip().splitlines()
    assert "4 images to train on, 2 to measure on, 16 decoder passes, 2 seeds" in head and "box IoU" in columns
    assert len(rows) == 6 and all(len(re.findall(r"[\d.]+ ± +[\d.]+", row)) == 7 for row in rows)
    assert [row[:24].strip() for row in rows] == [
        "original", "reference", "focal (x 20) + Dice", "mixed", "flips", "mixed, neck too"]
    measured = [re.findall(r"[\d.]+ ± +[\d.]+", row) for row in rows]
    assert any(values != measured[0] for values in measured[1:])  # the trained weights are measured


def test_the_study_of_sizes_prints_a_row_for_each_size_and_recipe(data, weights):
    done = run("benchmarks/study_sizes.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--passes", 8,
               "--seeds", 1, "--workers", 1, "--sizes", 2, 4, "--recipes", "reference", "improved", cwd=data)
    head, columns, *rows = done.stdout.strip().splitlines()
    assert "up to 6 images to train on, 4 to measure on, 8 decoder passes, 1 seeds" in head and "no prompt" in columns
    assert [row.split()[:2] for row in rows] == [
        [size, recipe] for size in ("2", "4") for recipe in ("reference", "improved")]
    assert all(len(re.findall(r"([\d.]+) \(\1 to \1\)", row)) == 3 for row in rows)  # one seed
    assert len({tuple(row.split()[2:]) for row in rows}) > 1  # the trained weights are measured


def test_the_training_benchmark_prints_ratios(tmp_path):
    done = run("benchmarks/bench_training.py", "--model-cfg", SMALL_CFG, "--images", 3, "--device", "cpu", cwd=tmp_path)
    assert "3 images, 11 visits, batch size 1" in done.stdout and len(re.findall(r"\d+\.\d\dx", done.stdout)) == 3
    assert [int(count) for count in re.findall(r"\((\d+) visits\)", done.stdout)] == [11, 3, 8]


def test_the_comparison_benchmark_prints_a_ratio(tmp_path):
    done = run("benchmarks/bench_compare.py", "--model-cfg", SMALL_CFG, "--images", 2, "--device", "cpu", cwd=tmp_path)
    assert re.search(r"encoded twice \d\.\d+, encoded once \d\.\d+, ratio \d+\.\d\dx", done.stdout)


def test_the_window_benchmark_prints_seconds(tmp_path):
    done = run("benchmarks/bench_window.py", "--model-cfg", SMALL_CFG, "--clicks", 2, "--width", 80, "--height", 60,
               "--device", "cpu", cwd=tmp_path)
    assert re.search(r"click to redrawn mask: median \d+\.\d+ s", done.stdout)


def test_the_study_of_annotation_prints_a_row_for_each_variant(data):
    done = run("benchmarks/study_annotation.py", "--model-cfg", SMALL_CFG, "--checkpoint", ROOT / "demo/sam2_demo.pt",
               "--split", "train", "--images", 4, "--steps", 2, "--every", 3, "--iterations", 2, cwd=data)
    *_, frozen, learning, training, last = done.stdout.strip().splitlines()
    rows = [re.findall(r"[\d.]+", row) for row in (frozen, learning, training)]
    assert all(len(row) == 9 for row in rows) and rows[0][:6] != rows[1][:6]
    assert last == "clicks to 0.75 IoU, second half: " + ", ".join(
        f"{name} {float(row[1]):.1f}" for name, row in zip(("frozen", "learning", "training"), rows))
    folder = data / "output/study_annotation"
    assert (folder / "study.png").stat().st_size > 5000 and (folder / "learning/learned.pt").is_file()


def test_the_onnx_benchmark_prints_sizes_ratios_and_iou(data, weights):
    done = run("benchmarks/bench_onnx.py", "--model-cfg", SMALL_CFG, "--checkpoint", weights, "--threads", 1,
               "--repeats", 1, "--image-dir", "data/images/val", "--mask-dir", "data/masks/val", "--num-images", 2,
               cwd=data)
    sizes = [float(size) for size in re.findall(r"^\w+: ([\d.]+) MB", done.stdout, re.MULTILINE)]
    assert len(sizes) == 4 and sizes[0] > sizes[1] > sizes[2]
    assert len(re.findall(r"ratio \d+\.\d\dx", done.stdout)) == 4  # three encoders, one decoder
    agreement = dict(re.findall(r"2 images, (\w+): .* torch's masks ([\d.]+)", done.stdout))
    assert float(agreement["torch"]) > 0.999 and float(agreement["float32"]) > 0.99
