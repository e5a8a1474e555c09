"""extras/convert_checkpoint.py, run as a user runs it, with logits compared with sam2's own.

| tests | subject |
|---|---|
| round trip | the same bits after converting there and back, sizes, image size |
| transformers | the image model, the video model and the pipeline give sam2's logits |
| errors | other models, wrong folders and flags, targets that cannot be written |
"""

import json
import re

import convert_checkpoint
import cv2
import numpy as np
import pytest
import torch
from common import load_predictor, load_video_predictor
from conftest import ROOT, SMALL_CFG, assert_fails_in_one_line, draw_pair, run
from hydra import compose
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from transformers import Sam2Model, Sam2Processor, Sam2VideoModel, Sam2VideoProcessor, pipeline

SCRIPT = "extras/convert_checkpoint.py"
DEMO = ROOT / "demo" / "sam2_demo.pt"
SIDE = 256


def load(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with sam2.1_hiera_tiny at 256 px, all weights random (also those that SAM 2 initializes to 0 or 1):
    tiny.yaml, tiny.pt, and hf/ and back.pt, which the script has written; and its output."""
    folder = tmp_path_factory.mktemp("tiny")
    config = compose(config_name="configs/sam2.1/sam2.1_hiera_t.yaml")
    OmegaConf.set_struct(config, False)
    config.model.image_size = SIDE
    OmegaConf.save(config, folder / "tiny.yaml")
    torch.manual_seed(0)
    weights = instantiate(config.model, _recursive_=True).state_dict()
    for tensor in weights.values():
        tensor += 0.05 * torch.randn_like(tensor)
    torch.save({"model": weights}, folder / "tiny.pt")
    there = run(SCRIPT, "tiny.pt", "hf", "--model-cfg", "tiny.yaml", cwd=folder)
    back = run(SCRIPT, "hf", "back.pt", "--model-cfg", "tiny.yaml", cwd=folder)
    return folder, there.stdout + back.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which the demo's trained model is hf/."""
    folder = tmp_path_factory.mktemp("demo")
    run(SCRIPT, DEMO, "hf", "--model-cfg", SMALL_CFG, cwd=folder)
    return folder


def test_converting_to_hugging_face_and_back_keeps_every_bit(tiny, demo):
    folder, printed = tiny
    assert_same_bits(load(folder / "tiny.pt"), load(folder / "back.pt"))
    assert printed.count("최대 차이") == 2 and "Sam2VideoModel도 같은 방식" in printed
    assert "파라미터 38,962,498개, 입력 256px" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["back.pt", "hf", "tiny.pt", "tiny.yaml"]
    assert sorted(path.name for path in (folder / "hf").iterdir()) == [
        "config.json", "model.safetensors", "processor_config.json"]
    run(SCRIPT, "hf", "back.pt", "--model-cfg", SMALL_CFG, cwd=demo)
    assert_same_bits(load(DEMO), load(demo / "back.pt"))


@pytest.mark.parametrize("size", ["s", "b+", "l"])
def test_weights_of_the_other_model_sizes_are_the_same_after_the_round_trip(size):
    model = instantiate(compose(config_name=f"configs/sam2.1/sam2.1_hiera_{size}.yaml").model, _recursive_=True)
    there = convert_checkpoint.huggingface_weights(model.state_dict())
    config = convert_checkpoint.huggingface_config(model)
    assert {name: tensor.shape for name, tensor in there.items()} == convert_checkpoint.expected_shapes(config)
    assert_same_bits(model.state_dict(), convert_checkpoint.weights_from_huggingface(there))


def test_the_image_size_of_training_is_kept_and_replaced_files_are_named(tmp_path, monkeypatch, capsys):
    torch.save({"model": load(DEMO), "image_size": 512}, tmp_path / "trained.pt")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("an older one")
    convert(monkeypatch, tmp_path / "trained.pt", tmp_path / "hf", "--model-cfg", SMALL_CFG)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["image_size"] == config["prompt_encoder_config"]["image_size"] == 512
    printed = capsys.readouterr().out
    assert "입력 512px" in printed and "로 학습했는데" not in printed
    assert "파일을 바꿉니다: config.json\n" in printed


def test_other_memory_channels_than_64_are_reported_and_the_image_model_still_opens(tmp_path, monkeypatch, capsys):
    config = OmegaConf.load(SMALL_CFG)
    config.model.memory_encoder.out_dim = config.model.memory_encoder.position_encoding.num_pos_feats = 32
    config.model.memory_attention.layer.cross_attention.kv_in_dim = 32
    OmegaConf.save(config, tmp_path / "small.yaml")
    model = instantiate(config.model, _recursive_=True)
    torch.save({"model": model.state_dict()}, tmp_path / "small.pt")
    convert(monkeypatch, tmp_path / "small.pt", tmp_path / "hf", "--model-cfg", tmp_path / "small.yaml")
    printed = capsys.readouterr().out
    assert "64개인 모델만 엽니다 (이 모델은 32개)" in printed and "Sam2VideoModel도 같은 방식" not in printed
    assert Sam2Model.from_pretrained(tmp_path / "hf").config.prompt_encoder_config.image_size == 256


def test_the_hugging_face_config_describes_the_architecture_of_the_model(demo, tiny):
    config = json.loads((demo / "hf" / "config.json").read_text())
    trunk = OmegaConf.load(SMALL_CFG).model.image_encoder.trunk
    backbone = config["vision_config"]["backbone_config"]
    assert backbone["blocks_per_stage"] == list(trunk.stages)
    assert backbone["embed_dim_per_stage"] == [trunk.embed_dim * 2**stage for stage in range(4)]
    assert backbone["window_size_per_stage"] == list(trunk.window_spec)
    assert backbone["global_attention_blocks"] == list(trunk.global_att_blocks)
    assert config["image_size"] == config["prompt_encoder_config"]["image_size"] == 256
    assert config["vision_config"]["backbone_feature_sizes"] == [[64, 64], [32, 32], [16, 16]]
    processor = json.loads((demo / "hf" / "processor_config.json").read_text())
    assert processor["image_processor"]["size"] == processor["video_processor"]["size"] == {"height": 256, "width": 256}
    assert json.loads((tiny[0] / "hf" / "config.json").read_text())["memory_attention_num_layers"] == 4


@pytest.mark.parametrize("prompt", ["click", "box"])
def test_the_image_model_of_transformers_gives_the_logits_of_sam2(demo, tiny, prompt):
    image = cv2.resize(draw_pair(0)[0], (SIDE, SIDE))  # the models' own size: sam2 and transformers resize differently
    point, box = [110.0, 140.0], [60.0, 70.0, 190.0, 200.0]
    for config, weights, folder in ((SMALL_CFG, DEMO, demo / "hf"),
                                    (tiny[0] / "tiny.yaml", tiny[0] / "tiny.pt", tiny[0] / "hf")):
        predictor = load_predictor(config, weights, "cpu")
        predictor.set_image(image)
        model, processor = Sam2Model.from_pretrained(folder).eval(), Sam2Processor.from_pretrained(folder)
        if prompt == "click":
            theirs = {"input_points": [[[point]]], "input_labels": [[[1]]]}
            expected = predictor.predict(np.array([point]), np.array([1]), return_logits=True)
        else:
            theirs = {"input_boxes": [[box]]}
            expected = predictor.predict(box=np.array(box), return_logits=True)
        with torch.inference_mode():
            outputs = model(**processor(images=image, return_tensors="pt", **theirs))
        masks = processor.post_process_masks(outputs.pred_masks, [[SIDE, SIDE]], binarize=False)[0][0]
        assert np.abs(expected[0]).max() > 1  # large logits, so that a tolerance of 1e-3 is meaningful
        assert np.abs(masks.numpy() - expected[0]).max() < 1e-3
        assert np.abs(outputs.iou_scores[0, 0].numpy() - expected[1]).max() < 1e-4


def test_the_video_model_of_transformers_gives_the_logits_of_sam2(tiny, tmp_path):
    """A click on the first of four frames, tracked through the rest: memory encoder, memory attention, pointers."""
    folder = tiny[0]
    image = cv2.resize(draw_pair(0)[0], (SIDE, SIDE))
    for number in range(4):
        moved = np.roll(image, 6 * number, axis=1)
        (tmp_path / f"{number}.jpg").write_bytes(cv2.imencode(".jpg", moved)[1].tobytes())
    frames = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in sorted(tmp_path.iterdir())]
    predictor = load_video_predictor(folder / "tiny.yaml", folder / "tiny.pt", "cpu")
    state = predictor.init_state(str(tmp_path))
    predictor.add_new_points_or_box(state, 0, 1, points=[[110, 140]], labels=[1])
    expected = [logits[0, 0].numpy() for _, _, logits in predictor.propagate_in_video(state)]

    model, processor = (kind.from_pretrained(folder / "hf") for kind in (Sam2VideoModel, Sam2VideoProcessor))
    session = processor.init_video_session(video=frames)
    processor.add_inputs_to_inference_session(session, frame_idx=0, obj_ids=1, input_points=[[[[110, 140]]]],
                                              input_labels=[[[1]]])
    model.eval()(session, frame_idx=0)
    masks = [processor.post_process_masks([output.pred_masks], [[SIDE, SIDE]], binarize=False)[0][0, 0].numpy()
             for output in model.propagate_in_video_iterator(session)]
    assert len(masks) == len(expected) == 4
    assert np.abs(expected[3] - expected[0]).max() > 0.1  # the memory changes what is predicted
    for mask, logits in zip(masks, expected):
        assert np.abs(mask - logits).max() < 1e-3


def test_the_mask_generation_pipeline_of_transformers_opens_the_folder(demo):
    generate = pipeline("mask-generation", model=str(demo / "hf"), device="cpu")
    image = Image.fromarray(cv2.cvtColor(draw_pair(0)[0], cv2.COLOR_BGR2RGB))
    assert generate(image, points_per_crop=4, pred_iou_thresh=0, stability_score_thresh=0)["masks"]


def test_converting_an_image_model_back_needs_the_original_checkpoint_for_the_memory(demo, tmp_path, monkeypatch):
    model = Sam2Model.from_pretrained(demo / "hf")
    with torch.no_grad():
        model.mask_decoder.iou_token.weight += 1  # fine-tuned with transformers
    model.save_pretrained(tmp_path / "image_model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="메모리.*--checkpoint"):
        convert(monkeypatch, "image_model", "back.pt", "--model-cfg", SMALL_CFG)
    convert(monkeypatch, "image_model", "back.pt", "--model-cfg", SMALL_CFG, "--checkpoint", DEMO)
    expected = load(DEMO)
    expected["sam_mask_decoder.iou_token.weight"] += 1
    assert_same_bits(expected, load(tmp_path / "back.pt"))


@pytest.mark.parametrize("kind", ["sam", "sam3", "sam3_video"])
def test_folders_of_sam_1_and_sam_3_are_refused(tmp_path, monkeypatch, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(SystemExit, match=f"SAM 2가 아니라 {kind}의"):
        convert(monkeypatch, tmp_path, tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


def test_wrong_folders_and_architectures_end_in_one_line(tmp_path, demo, monkeypatch):
    (tmp_path / "empty").mkdir()
    done = run(SCRIPT, "empty", "back.pt", cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "empty", "config.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "sam2_video"}')
    with pytest.raises(SystemExit, match="model.safetensors가 없습니다"):
        convert(monkeypatch, "empty", "back.pt")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SystemExit, match="손상되었습니다"):
        convert(monkeypatch, "empty", "back.pt")
    for source, target in ((demo / "hf", "back.pt"), (DEMO, "hf")):
        other = "configs/sam2.1/sam2.1_hiera_t.yaml"
        with pytest.raises(SystemExit, match=rf"{re.escape(str(source))}(가 손상되었거나|: 맞지 않는) 설정 {other}"):
            convert(monkeypatch, source, target, "--model-cfg", other)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]  # no partial files


def test_flags_of_the_other_direction_are_refused(demo):
    assert "--image-size" in run(SCRIPT, "hf", "back.pt", "--image-size", 512, cwd=demo, code=2).stderr
    assert "--checkpoint" in run(SCRIPT, DEMO, "there", "--checkpoint", DEMO, cwd=demo, code=2).stderr


def test_a_target_that_cannot_be_written_ends_in_one_line(tmp_path, demo, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match="folder: 파일이어야 하는데 폴더가"):
        convert(monkeypatch, demo, tmp_path / "folder")  # before it reads the source
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    done = run(SCRIPT, demo / "hf", "back.pt", "--model-cfg", SMALL_CFG, cwd=tmp_path, code=1, before=full)
    assert_fails_in_one_line(done, "File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_converted_model_that_differs_from_the_original_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_checkpoint, "largest_difference", lambda predictor, folder: float("nan"))
    with pytest.raises(SystemExit, match="저장하지 않았습니다"):
        convert(monkeypatch, DEMO, tmp_path / "hf", "--model-cfg", SMALL_CFG)
    assert not list(tmp_path.iterdir())


def convert(monkeypatch, *arguments):
    """The script's main() in this process."""
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
    convert_checkpoint.main()
