"""extras/export_onnx.py, run as a user runs it, and its files, run without torch.

| tests | subject |
|---|---|
| files | layout of samexporter, agreement with torch, prompts of every kind |
| the guide's lines | segmentation without torch |
| --fp16, --int8 | sizes, weights out of range, empty weights |
| errors | unsupported configs, files that differ from torch |
"""

import re
import shutil
import subprocess
import sys

import cv2
import export_onnx
import make_demo_data
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from common import load_predictor
from conftest import ENV, ROOT, SMALL_CFG, assert_fails_in_one_line, run
from hydra.utils import instantiate
from omegaconf import OmegaConf

SCRIPT = "extras/export_onnx.py"
DEMO = ROOT / "demo" / "sam2_demo.pt"
FILES = ("sam2_best.encoder.onnx", "sam2_best.decoder.onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder in which the demo model was exported to onnx/, and the finished process."""
    folder = tmp_path_factory.mktemp("내 모델")
    (folder / "output").mkdir()
    shutil.copy(DEMO, folder / "output" / "sam2_best.pt")
    return folder, run(SCRIPT, "output/sam2_best.pt", "onnx", "--model-cfg", SMALL_CFG, cwd=folder)


@pytest.fixture
def no_export(exported, monkeypatch):
    """The export itself is replaced by a copy of the exported files."""
    def copy(model, *paths):
        for name, path in zip(FILES, paths):
            shutil.copy(exported[0] / "onnx" / name, path)
    monkeypatch.setattr(export_onnx, "export_files", copy)


def export(monkeypatch, *arguments):
    """The script's main() in this process."""
    monkeypatch.setattr("sys.argv", ["export_onnx.py", *map(str, arguments)])
    export_onnx.main()


def open_files(folder):
    return [onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"]) for name in FILES]


def test_the_files_agree_with_torch_and_have_the_layout_of_samexporter(exported):
    folder, done = exported
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == sorted(FILES)
    assert float(re.search(r"최대 차이 (\S+)", done.stdout)[1]) < 1e-3 and not done.stderr
    assert all(f"저장: onnx/{name}\n" in done.stdout.replace("\\", "/") for name in FILES)
    encoder, decoder = open_files(folder / "onnx")
    described = [[(item.name, item.shape, item.type) for item in items] for session in (encoder, decoder)
                 for items in (session.get_inputs(), session.get_outputs())]
    assert all(kind == "tensor(float)" for items in described for _, _, kind in items)
    features = [("high_res_feats_0", [1, 16, 64, 64]), ("high_res_feats_1", [1, 32, 32, 32]),
                ("image_embed", [1, 128, 16, 16])]
    inputs, outputs, prompts, results = [[item[:2] for item in items] for items in described]
    assert inputs == [("image", [1, 3, 256, 256])] and outputs == features
    assert prompts == [features[2], *features[:2], ("point_coords", ["num_labels", "num_points", 2]),
                       ("point_labels", ["num_labels", "num_points"]), ("mask_input", ["num_labels", 1, 64, 64]),
                       ("has_mask_input", ["num_labels"])]
    assert [name for name, _ in results] == ["masks", "iou_predictions"]


def test_the_code_in_the_guide_segments_without_torch_as_test_my_image_does(exported):
    folder, _ = exported
    image, _ = make_demo_data.draw_image(np.random.default_rng(0))
    image = cv2.resize(image, (640, 480))[..., ::-1]
    (folder / "photo.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
    chapter = (ROOT / "extras" / "GUIDE.md").read_text(encoding="utf-8").split("## ONNX로 내보내기")[1]
    lines = re.search(r"```python\n(.*?)```", chapter, re.DOTALL)[1]
    blocked = "import sys\nsys.modules.update(torch=None, torchvision=None, sam2=None)\n"  # their import fails
    with pytest.raises(subprocess.CalledProcessError, match="exit status 1"):
        subprocess.run([sys.executable, "-c", blocked + "import torch"], check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", blocked + lines], cwd=folder, env=ENV, check=True)
    run("test_my_image.py", "--model-cfg", SMALL_CFG, "--image", "photo.jpg", "--point", "320,200", cwd=folder)
    ours, theirs = (cv2.imdecode(np.fromfile(folder / name, np.uint8), cv2.IMREAD_UNCHANGED)
                    for name in ("photo_mask.png", "output/my_results/photo_mask.png"))
    assert ours.shape == theirs.shape == (480, 640) and 0.01 < (theirs > 0).mean() < 0.9
    assert (ours != theirs).mean() < 1e-4


def test_any_number_of_points_boxes_and_masks_gives_the_logits_of_torch(exported):
    encoder, decoder = open_files(exported[0] / "onnx")
    predictor = load_predictor(SMALL_CFG, DEMO, "cpu")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (256, 256, 3), np.uint8)
    predictor.set_image(image)
    pixels = ((image / 255 - export_onnx.MEAN) / export_onnx.STD).transpose(2, 0, 1)[None].astype(np.float32)
    features = dict(zip(export_onnx.FEATURES, encoder.run(None, {"image": pixels})))

    def largest_difference(coords, labels, rough=None, **prompts):
        _, scores, logits = predictor.predict(mask_input=rough, multimask_output=True, **prompts)
        masks, iou = decoder.run(None, {
            **features, "point_coords": coords.astype(np.float32), "point_labels": labels.astype(np.float32),
            "mask_input": np.zeros((1, 1, 64, 64), np.float32) if rough is None else rough[None],
            "has_mask_input": np.array([rough is not None], np.float32)})  # of one object, for all
        assert masks.shape == (len(coords), 3, 64, 64) and iou.shape == (len(coords), 3)
        return max(np.abs(masks - logits).max(), np.abs(iou - scores).max())

    twenty, box = rng.uniform(0, 256, (1, 20, 2)), np.array([30, 40, 200, 220])
    labels, corners = rng.integers(0, 2, (1, 20)), box.reshape(1, 2, 2)
    rough = rng.normal(0, 5, (1, 64, 64)).astype(np.float32)
    for difference in (
            largest_difference(twenty, labels, point_coords=twenty[0], point_labels=labels[0]),
            largest_difference(corners, np.array([[2, 3]]), box=box),
            largest_difference(corners, np.array([[2, 3]]), rough, box=box),
            largest_difference(np.concatenate([corners, twenty], 1), np.insert(labels, [0, 0], [2, 3], 1), box=box,
                               point_coords=twenty[0], point_labels=labels[0]),
            largest_difference(twenty.reshape(5, 4, 2), labels.reshape(5, 4),
                               point_coords=twenty.reshape(5, 4, 2), point_labels=labels.reshape(5, 4)),
            largest_difference(np.zeros((1, 1, 2)), -np.ones((1, 1)), point_coords=np.zeros((1, 2)),
                               point_labels=-np.ones(1))):
        assert difference < 1e-3


def test_a_custom_config_and_the_image_size_of_training_are_exported(tmp_path, monkeypatch, capsys):
    config = OmegaConf.load(SMALL_CFG)
    config.model.directly_add_no_mem_embed = False
    OmegaConf.save(config, tmp_path / "own.yaml")
    weights = torch.load(DEMO, weights_only=True)["model"]
    torch.save({"model": weights, "image_size": 192}, tmp_path / "sam2_best.pt")
    export(monkeypatch, tmp_path / "sam2_best.pt", tmp_path / "half", "--model-cfg", tmp_path / "own.yaml", "--fp16")
    encoder, decoder = open_files(tmp_path / "half")
    assert encoder.get_inputs()[0].shape == [1, 3, 192, 192] and decoder.get_inputs()[5].shape[2:] == [48, 48]
    printed = capsys.readouterr().out
    (whole, exact), (half, near) = re.findall(r"인코더 (\S+) MB, .* 차이 (\S+)", printed)
    assert "학습했는데" not in printed and float(exact) < 1e-3 and float(near) < 0.5
    assert float(half) < 0.6 * float(whole)


def test_configs_without_high_resolution_features_are_refused(tmp_path, monkeypatch):
    config = OmegaConf.load(SMALL_CFG)
    config.model.use_high_res_features_in_sam = False
    OmegaConf.save(config, tmp_path / "own.yaml")
    torch.save(instantiate(config.model, _recursive_=True).state_dict(), tmp_path / "own.pt")
    with pytest.raises(SystemExit, match="own.yaml: use_high_res_features_in_sam"):
        export(monkeypatch, tmp_path / "own.pt", tmp_path / "onnx", "--model-cfg", tmp_path / "own.yaml")


def test_int8_shrinks_the_encoder_and_replaced_files_are_named(exported, no_export, tmp_path, monkeypatch, capsys):
    target = tmp_path / "sam2_demo.encoder.onnx"
    target.write_bytes(b"an older one")
    export(monkeypatch, DEMO, tmp_path, "--model-cfg", SMALL_CFG, "--int8")
    printed = capsys.readouterr().out
    assert f"저장: {target} (있던 파일을 바꿈)\n" in printed and printed.count("바꿈") == 1
    (_, exact), (_, near) = re.findall(r"인코더 (\S+) MB, .* 차이 (\S+)", printed)
    assert float(exact) < 1e-3 < float(near) < 10
    assert target.stat().st_size < 0.45 * (exported[0] / "onnx" / FILES[0]).stat().st_size
    assert {node.op_type for node in onnx.load(target).graph.node} > {"MatMulInteger"}


def test_files_that_differ_from_torch_are_not_written(no_export, tmp_path, monkeypatch):
    (tmp_path / "sam2_demo.encoder.onnx").write_bytes(b"an older one")
    monkeypatch.setattr(export_onnx, "MEAN", (0.5, 0.5, 0.5))
    with pytest.raises(SystemExit, match="저장하지 않았습니다"):
        export(monkeypatch, DEMO, tmp_path, "--model-cfg", SMALL_CFG)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an older one"]


def test_weights_out_of_the_range_of_fp16_are_refused(exported, tmp_path):
    model = onnx.load(exported[0] / "onnx" / FILES[0])
    weight = next(item for item in model.graph.initializer if item.name.endswith("patch_embed.proj.bias"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = -70_000
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "large.onnx")
    with pytest.raises(SystemExit, match=r"patch_embed\.proj\.bias.*--fp16 없이"):
        export_onnx.halve_weights(tmp_path / "large.onnx")


def test_empty_weights_are_stored_as_fp16(tmp_path):
    kind, zeros = onnx.TensorProto.FLOAT, np.zeros(0, np.float32)
    node = onnx.helper.make_node("Identity", ["empty"], ["result"])
    graph = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_tensor_value_info("result", kind, [0])],
                                   [onnx.numpy_helper.from_array(zeros, "empty")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "empty.onnx")
    export_onnx.halve_weights(tmp_path / "empty.onnx")
    assert onnx.load(tmp_path / "empty.onnx").graph.initializer[0].data_type == onnx.TensorProto.FLOAT16


def test_errors_end_in_one_line_and_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert_fails_in_one_line(run(SCRIPT, DEMO, "file/onnx", "--model-cfg", SMALL_CFG, cwd=tmp_path, code=1), "file")
    for checkpoint, word in (("missing.pt", "missing.pt"), (DEMO, "sam2.1_hiera_s.yaml")):
        with pytest.raises(SystemExit, match=word):
            export(monkeypatch, checkpoint, "onnx")
    with pytest.raises(SystemExit):
        export(monkeypatch, DEMO, "onnx", "--fp16", "--int8")
    assert "not allowed with" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
