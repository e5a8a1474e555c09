"""extras/label_with_text.py, run as a user runs it. Detectors are tiny and untrained: only the pipeline is tested.

| tests | subject |
|---|---|
| boxes | labels from boxes, masks of sam2, NMS, unreadable images |
| detectors | answers of Florence-2 and logits of Grounding DINO, by hand |
| model folders | missing, incomplete or unsafe weights, other models |
| output | unusable targets, preview, two processes, the benchmark |
"""

import json
import re
import shutil
import subprocess
import sys
import unicodedata

import cv2
import huggingface_hub.constants
import label_with_text
import numpy as np
import pytest
import supervision as sv
import torch
from common import load_predictor
from conftest import ENV, ROOT, SMALL_CFG, assert_fails_in_one_line, draw_pair, run, write_image
from files import calculate_iou
from pycocotools import mask as coco_mask
from tokenizers import pre_tokenizers
from transformers import (
    BartTokenizer,
    BertTokenizer,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
)

SCRIPT = "extras/label_with_text.py"
WEIGHTS = ROOT / "demo" / "sam2_demo.pt"
MODEL = ("--model-cfg", SMALL_CFG, "--checkpoint", WEIGHTS, "--original", "--device", "cpu")
ANSWER = ["p", "o", "l", "y", "p", "<loc_250>", "<loc_100>", "<loc_749>", "<loc_899>", "</s>"]


@pytest.fixture(scope="session")
def florence(tmp_path_factory):
    """The folder of a tiny Florence-2 that answers ANSWER to every prompt: position n of the decoder gives token n of
    the answer for any image."""
    folder = tmp_path_factory.mktemp("florence2")
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = BartTokenizer(vocab={token: number for number, token in enumerate(letters)}, merges=[],
                              extra_special_tokens={"image_token": "<image>"})
    tokenizer.add_tokens([*(f"<loc_{number}>" for number in range(1000)), "<poly>", "</poly>", "<sep>"])
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5  # 2 x 2 places and their mean
    kinds = ("phrase_grounding", "description_with_bboxes_or_polygons")
    Florence2Processor(images, tokenizer, post_processor_config={kind: {} for kind in kinds}).save_pretrained(folder)
    model = Florence2ForConditionalGeneration(Florence2Config(
        image_token_id=tokenizer.image_token_id,
        vision_config={"depths": [1] * 4, "embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4,
                       "window_size": 2, "projection_dim": 16, "max_temporal_embeddings": 4,
                       "max_position_embeddings": 8},
        text_config={"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1,
                     "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                     "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "bos_token_id": 0, "pad_token_id": 1,
                     "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}))
    decoder = model.model.language_model.decoder
    with torch.no_grad():
        for layer in decoder.layers:
            for part in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                part.weight.zero_()
        decoder.embed_tokens.weight.zero_()
        decoder.embed_positions.weight.zero_()
        for place, token in enumerate(ANSWER):
            decoder.embed_positions.weight[place + 2, place] = 1000  # Bart's positions begin at 2
            decoder.embed_tokens.weight[tokenizer.convert_tokens_to_ids(token), place] += 10
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def grounding_dino(tmp_path_factory):
    """The folder of a tiny Grounding DINO with random weights: four boxes somewhere, scores about one half."""
    folder = tmp_path_factory.mktemp("grounding-dino")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "poly", "##p", "red", "car"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(GroundingDinoConfig(
        backbone_config={"model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1] * 4,
                         "num_heads": [1] * 4, "window_size": 4, "out_indices": [2, 3, 4]},
        text_config={"model_type": "bert", "vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64},
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=4)).save_pretrained(folder)
    return folder


@pytest.fixture
def predictor():
    return load_predictor(SMALL_CFG, WEIGHTS, "cpu")


def draw_images(folder, count=1):
    """Draw `count` images of 80 x 60 into folder/photos; returns their boxes [x, y, width, height]."""
    boxes = []
    for number in range(count):
        image, mask = draw_pair(number)
        write_image(folder / "photos" / f"image_{number}.png", image)
        boxes.append(list(map(float, cv2.boundingRect(mask))))
    return boxes


def write_boxes(path, annotations, images, categories=("polyp", "instrument"), size=(80, 60)):
    """A COCO file; annotations: (image number, category number, box, further keys)."""
    path.write_text(json.dumps({
        "images": [{"id": number, "file_name": name, "width": size[0], "height": size[1]}
                   for number, name in enumerate(images)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories)],
        "annotations": [{"id": number, "image_id": image, "category_id": category, "bbox": box, **more}
                        for number, (image, category, box, more) in enumerate(annotations)]}), encoding="utf-8")
    return path


def read_labels(folder):
    return json.loads((folder / "annotations.json").read_text(encoding="utf-8"))


def assert_valid_coco(labels):
    """Assert the properties that readers of COCO files, such as pycocotools, rely on."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in labels["images"]}
    for number, annotation in enumerate(labels["annotations"], 1):
        mask = coco_mask.decode(annotation["segmentation"])
        assert annotation["id"] == number and annotation["iscrowd"] == 0
        assert annotation["segmentation"]["size"] == list(mask.shape) == sizes[annotation["image_id"]]
        assert annotation["area"] == mask.sum() > 0 and 0 <= annotation["score"] <= 1
        x, y, width, height = annotation["bbox"]
        assert 0 <= x <= x + width <= mask.shape[1] and 0 <= y <= y + height <= mask.shape[0]


def test_boxes_become_coco_labels_and_unusable_images_and_boxes_are_named(tmp_path):
    boxes = draw_images(tmp_path, 6)
    write_image(tmp_path / "photos" / "image_3.jpg", draw_pair(3)[0])  # the stem of image_3.png
    (tmp_path / "photos" / "image_4.png").write_bytes(b"no image")
    write_image(tmp_path / "photos" / "other.png", draw_pair(9)[0])
    coco = write_boxes(tmp_path / "boxes.json", [
        (0, 0, boxes[0], {}), (0, 1, [2, 2, 10, 8], {}), (0, 0, [-20, -20, 5, 5], {}), (0, 0, [10, 10, 0, 9], {}),
        (0, 1, [70, 50, 40, 40], {}), (0, 0, [5, 5, float("nan"), 9], {}), (0, 0, [float("nan"), 5, 20, 9], {}),
        (0, 0, [float("-inf"), 5, 20, 9], {}), (0, 0, boxes[0], {"iscrowd": 1}), (5, 0, boxes[5], {})],
        [*(f"sub/image_{number}.png" for number in range(6)), "gone.png"])
    done = run(SCRIPT, "--images", "photos", "--boxes", coco, "--plot", "--preprocess", "--output", "out", *MODEL,
               cwd=tmp_path)
    for line in ("iscrowd 상자 1개", "image_0.png - 이미지 밖이거나 1픽셀보다 작은 상자 5개 제외",
                 "폴더에 없는 이미지 1장: gone.png\n", "image_1.png - 상자 없음",
                 "image_3.jpg - 이름이 같은", "image_3.png - 이름이 같은",
                 "image_4.png - 손상되었거나", "other.png - COCO 파일에 없음",
                 "라벨이 있는 이미지 2장, 객체 4개: polyp 2, instrument 2", "학습 2쌍"):
        assert line in done.stdout, line
    labels = read_labels(tmp_path / "out")
    assert_valid_coco(labels)
    assert [image["file_name"] for image in labels["images"]] == [f"image_{number}.png" for number in (0, 1, 2, 5)]
    assert labels["categories"] == [{"id": 0, "name": "polyp"}, {"id": 1, "name": "instrument"}]
    assert [a["bbox"] for a in labels["annotations"]] == [boxes[0], [2, 2, 10, 8], [70, 50, 10, 10], boxes[5]]
    assert all(annotation["score"] == 1 for annotation in labels["annotations"])
    plot = cv2.imread(str(tmp_path / "out" / "plots" / "image_0.png"))
    assert plot.shape == (60, 80, 3) and (plot != draw_pair(0)[0]).any()


def test_masks_of_boxes_equal_those_of_sam2_and_match_a_drawn_ellipse(tmp_path, predictor):
    image, truth = draw_pair(0)
    x, y, width, height = cv2.boundingRect(truth)
    boxes = np.array([[x, y, x + width, y + height], [0, 0, 80, 60], [3, 4, 30, 20]], np.float32)

    class Given:
        categories = {7: "ellipse"}

        def find(self, image, name):
            return sv.Detections(xyxy=boxes, class_id=np.full(len(boxes), 7))

    detections = label_with_text.GroundedSAM2(predictor, Given()).predict(image)
    assert detections.mask.dtype == bool and detections.mask.shape == (3, 60, 80)
    assert list(detections["class_name"]) == ["ellipse"] * 3 and list(detections.confidence) == [1, 1, 1]
    predictor.set_image(image)
    for box, mask, score in zip(boxes, detections.mask, detections["predicted_iou"]):
        masks, scores, _ = predictor.predict(box=box, multimask_output=True)
        assert (masks[scores.argmax()].astype(bool) == mask).mean() > 0.999  # decoded one by one or together: rounding
        assert score == pytest.approx(scores.max(), abs=1e-5)
    assert calculate_iou(detections.mask[0], truth > 0) > 0.9


def test_a_hundred_boxes_take_one_encoding_and_two_decoder_calls(predictor):
    calls = []
    predictor.model.image_encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    predictor.model.sam_mask_decoder.register_forward_hook(lambda *_: calls.append("decoder"))
    corners = np.random.default_rng(0).uniform(0, 40, (100, 2))
    detector = type("Given", (), {"categories": {1: "x"}, "find": lambda self, image, name: sv.Detections(
        xyxy=np.hstack([corners, corners + 12]), class_id=np.ones(100, int))})()
    detections = label_with_text.GroundedSAM2(predictor, detector).predict(draw_pair(0)[0])
    assert len(detections) == 100 and calls == ["encoder", "decoder", "decoder"]


def test_boxes_with_scores_go_through_nms_within_their_category(tmp_path):
    box = [10, 10, 20, 20]
    near, far = [11, 10, 20, 20], [20, 10, 20, 20]  # IoU 0.905 and 1/3 with `box`
    image = np.zeros((60, 80, 3), np.uint8)
    for scores, kept in (((0.5, 0.9, 0.4, 0.3), [0.9, 0.4, 0.3]), ((None,) * 4, [1, 1, 1, 1])):
        coco = write_boxes(tmp_path / "boxes.json", [
            (0, category, box, {"score": score} if score else {})
            for (category, box), score in zip([(0, box), (0, near), (1, box), (0, far)], scores)], ["a.png"])
        found = label_with_text.CocoBoxes(coco).find(image, "a.png")
        kept_boxes = label_with_text.suppress(label_with_text.clip_to_image(found, image.shape))
        assert sorted(kept_boxes.confidence, reverse=True) == pytest.approx(kept)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_boxes_dropped_by_nms_are_counted_and_a_missing_score_turns_nms_off(tmp_path, predictor, capsys, missing):
    write_image(tmp_path / "a.png", draw_pair(0)[0])
    notes = []
    for score in (0.5, missing):
        coco = write_boxes(tmp_path / "boxes.json", [(0, 0, [10, 10, 20, 20], {"score": 0.9}),
                                                     (0, 0, [11, 10, 20, 20], {"score": score})], ["a.png"])
        model = label_with_text.GroundedSAM2(predictor, label_with_text.CocoBoxes(coco))
        notes.append(model.label_image(tmp_path / "a.png", None)[1])
    assert "다른 상자와 겹치는 상자 1개 제외" in notes[0] and "겹치는" not in notes[1]
    assert capsys.readouterr().out.count("상자 1개에 점수(score)가 없어, 점수가 있는 1개도") == 1


def test_florence2_weights_in_models_are_found_and_its_answer_becomes_a_label(tmp_path, florence):
    draw_images(tmp_path)
    (tmp_path / "photos").rename(tmp_path / "my photos")
    shutil.copytree(florence, tmp_path / "models" / "florence2")  # found there without a flag
    done = run(SCRIPT, "--images", "my photos", "--detector", "florence2", "--category", "polyp", "--output", "out",
               *MODEL, cwd=tmp_path)
    assert "다음: python prepare_data.py --images 'my photos' --coco out/annotations.json\n" in done.stdout
    assert "덮어씁니다" not in done.stdout
    annotation, = read_labels(tmp_path / "out")["annotations"]
    # thousandths of 80 x 60, at the middle of their bin, whole pixels: 20, 6, 59, 53
    assert annotation["bbox"] == [20, 6, 39, 47] and annotation["category_id"] == 1
    again = run(SCRIPT, "--images", "my photos", "--detector", "florence2", "--category", "polyp", "--output", "out",
                *MODEL, cwd=tmp_path)
    assert "이전 결과를 덮어씁니다: out/annotations.json\n" in again.stdout


def test_answers_of_florence2_become_the_boxes_computed_by_hand(florence):
    two = "</s><s>polyp<loc_100><loc_200><loc_500><loc_600><loc_0><loc_0><loc_999><loc_999></s>"
    boxes = [[100, 200, 500, 600], [0, 0, 999, 999]]  # of 1000 x 1000: bin n, its middle n + 0.5, cut to n
    shape = (1000, 1000, 3)
    detection, grounding = (label_with_text.Florence2(florence, ["polyp"], "cpu", task)
                            for task in ("detection", "grounding"))
    assert detection.read_answer(two, shape) == boxes == grounding.read_answer(two, shape)
    wide = detection.read_answer(two, (500, 2000, 3))  # bins of 2 x 0.5 pixels
    assert wide == [[201, 100, 1001, 300], [1, 0, 1999, 499]]
    polygon = "<s>polyp<poly><loc_100><loc_250><loc_500><loc_200><loc_300><loc_600></poly></s>"
    assert detection.read_answer(polygon, shape) == [[100, 200, 500, 600]]
    for nothing in ("</s><s></s>", "</s><s>polyp</s>"):
        assert detection.read_answer(nothing, shape) == grounding.read_answer(nothing, shape) == []


def test_grounding_dino_labels_several_categories(tmp_path, grounding_dino):
    draw_images(tmp_path, 2)
    done = run(SCRIPT, "--images", "photos", "--detector", "grounding-dino", "--category", "polyp. red car.",
               "--detector-dir", grounding_dino, "--box-threshold", 0.1, "--text-threshold", 0.1, "--output", "out",
               *MODEL, cwd=tmp_path)
    labels = read_labels(tmp_path / "out")
    assert_valid_coco(labels)
    assert [category["name"] for category in labels["categories"]] == ["polyp", "red car"]
    assert 1 <= len(labels["annotations"]) <= 8 and "다음: python prepare_data.py" in done.stdout


def test_logits_of_grounding_dino_become_the_boxes_computed_by_hand(grounding_dino):
    detector = label_with_text.GroundingDino(grounding_dino, ["Polyp", "red car"], "cpu")
    assert detector.text == "polyp. red car."  # [CLS] poly ##p . red car . [SEP]
    assert detector.tokens_of_categories() == [[1, 2], [4, 5]]
    probabilities = torch.full((5, 8), 0.01)
    probabilities[0, 2] = 0.9                              # the second half of a word: polyp
    probabilities[1, 1], probabilities[1, 5] = 0.4, 0.6    # both categories: red car
    probabilities[2, 4] = 0.29                             # below the box threshold
    probabilities[3, 3], probabilities[3, 1] = 0.8, 0.2    # a full stop; its best category is below the text threshold
    probabilities[4, 4] = 0.31
    outputs = type("Outputs", (), {})()
    outputs.logits = torch.full((1, 5, 256), -torch.inf)
    outputs.logits[0, :, :8] = probabilities.logit()
    outputs.pred_boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.25, 0.75, 0.1, 0.2], [0.5] * 4, [0.5] * 4,
                                        [0.9, 0.1, 0.2, 0.2]]])  # center and size, shares of the image
    input_ids = torch.tensor([detector.processor.tokenizer(detector.text)["input_ids"]])
    found = detector.read_outputs(outputs, input_ids, (100, 200, 3))
    assert found.class_id.tolist() == [1, 2, 2]
    assert found.confidence == pytest.approx([0.9, 0.6, 0.31], abs=1e-4)
    assert found.xyxy == pytest.approx(np.array([[50, 25, 150, 75], [40, 65, 60, 85], [160, 0, 200, 20]]), abs=1e-3)
    detector.text_threshold = 0.5
    outputs.logits[0, 4, 4] = 0  # a score of exactly 0.5, which is not above it
    assert detector.read_outputs(outputs, input_ids, (100, 200, 3)).class_id.tolist() == [1, 2]


def test_detectors_that_cannot_be_used_end_in_one_line(tmp_path, florence, grounding_dino):
    draw_images(tmp_path)
    flags = ("--images", "photos", "--category", "polyp", *MODEL)
    done = run(SCRIPT, *flags, "--detector", "florence2", cwd=tmp_path, code=1, env={"HF_HOME": str(tmp_path)})
    assert_fails_in_one_line(done, "hf download florence-community/Florence-2-base --local-dir models/florence2")
    done = run(SCRIPT, *flags, "--detector", "florence2", "--detector-dir", grounding_dino, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "grounding-dino 모델의 폴더", "florence2", "hf download florence-community/")


def test_missing_or_incomplete_detector_weights_name_the_download_command(tmp_path, florence, grounding_dino,
                                                                             monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, whole, detector_class in (("florence2", florence, label_with_text.Florence2),
                                        ("grounding-dino", grounding_dino, label_with_text.GroundingDino)):
        repository = label_with_text.REPOSITORIES[name]
        command = rf"\A오류: .*hf download {repository} --local-dir models/{name} .*\Z"  # one line
        with pytest.raises(SystemExit, match=command):
            label_with_text.find_weights(name)
        with pytest.raises(SystemExit, match=command):
            detector_class(label_with_text.find_weights(name, tmp_path / "nowhere"), ["polyp"], "cpu")
        cached = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
        shutil.copy(whole / "config.json", cached / "snapshots" / ("0" * 40))
        with pytest.raises(SystemExit, match=command):
            detector_class(label_with_text.find_weights(name), ["polyp"], "cpu")
        (tmp_path / "models" / name / ".cache").mkdir(parents=True)  # before the first file exists
        with pytest.raises(SystemExit, match=command):
            detector_class(label_with_text.find_weights(name), ["polyp"], "cpu")


def test_florence2_weights_that_need_remote_code_are_refused_with_the_right_repository(tmp_path, florence):
    """As in microsoft/Florence-2-base: florence2 at the top, below it model types that transformers lacks."""
    config = json.loads((florence / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_florence2.Florence2Config"}
    config["text_config"]["model_type"] = "florence2_language"
    shutil.copytree(florence, tmp_path / "remote")
    (tmp_path / "remote" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="자기 코드로 여는.*hf download florence-community/Florence-2-base"):
        label_with_text.Florence2(tmp_path / "remote", ["polyp"], "cpu")


@pytest.mark.parametrize("flags, words", [
    ("--boxes a.json --task grounding", "--boxes에는 --task 옵션을 쓸"),
    ("--boxes a.json --detector-dir models", "--boxes에는 --detector-dir 옵션을 쓸"),
    ("--boxes a.json --text-threshold 0.2", "--boxes에는 --text-threshold 옵션을 쓸"),
    ("--detector grounding-dino --category polyp --task detection", "grounding-dino에는 --task 옵션을 쓸"),
    ("--detector florence2 --category polyp --box-threshold 0", "florence2에는 --box-threshold 옵션을 쓸"),
    ("--detector grounding-dino --category polyp --box-threshold 30", "0에서 1 사이"),
    ("--detector grounding-dino --category polyp --box-threshold nan", "0에서 1 사이"),
    ("--detector florence2", "함께 씁니다")])
def test_flags_without_effect_and_thresholds_outside_0_to_1_are_refused(monkeypatch, capsys, flags, words):
    monkeypatch.setattr("sys.argv", ["label_with_text.py", "--images", "photos", *flags.split()])
    with pytest.raises(SystemExit) as failure:
        label_with_text.parse_args()
    assert failure.value.code == 2 and words in capsys.readouterr().err


def test_a_detector_folder_that_lacks_weights_or_holds_a_pickle_only_is_refused(tmp_path, florence, capsys):
    config = json.loads((florence / "config.json").read_text())
    config["text_config"]["decoder_layers"] = 2  # another layout: transformers would initialize the rest
    other = tmp_path / "other"
    shutil.copytree(florence, other)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="없는 항목"):
        label_with_text.Florence2(other, ["polyp"], "cpu")
    (other / "model.safetensors").unlink()
    torch.save({}, other / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="florence2 모델을 열 수 없습니다"):
        label_with_text.Florence2(other, ["polyp"], "cpu")


@pytest.mark.parametrize("text", ["[]", "{", '{"images": [], "categories": [], "annotations": [{"id": 1}]}',
                                  '{"images": [], "categories": [], "annotations": [{"bbox": [1, 2, 3, 4], '
                                  '"category_id": 1, "image_id": 1}]}',
                                  '{"images": [{"id": [], "file_name": "a"}], "categories": [], "annotations": []}',
                                  '{"images": [], "categories": [{"id": 1e999, "name": "a"}], "annotations": []}'])
def test_a_file_that_is_not_coco_with_boxes_is_refused(tmp_path, text):
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="COCO 형식이 아닙니다"):
        label_with_text.CocoBoxes(path)


def test_a_run_without_any_label_fails_in_one_line(tmp_path):
    draw_images(tmp_path)
    coco = write_boxes(tmp_path / "boxes.json", [], ["image_0.png"])
    done = run(SCRIPT, "--images", "photos", "--boxes", coco, "--output", "out", *MODEL, cwd=tmp_path, code=1)
    assert_fails_in_one_line(done, "하나도")
    assert not (tmp_path / "out" / "annotations.json").exists()


def test_an_output_folder_that_cannot_be_created_is_found_before_the_first_image(tmp_path):
    draw_images(tmp_path)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError):  # and not the error about the missing detector
        label_with_text.GroundedSAM2(None, None).label(tmp_path / "photos", tmp_path / "out")


def test_images_are_found_as_prepare_data_finds_them(tmp_path):
    for name in ("b.PNG", "a.jpg", "._a.jpg", "notes.txt", unicodedata.normalize("NFC", "폴립.png"),
                 unicodedata.normalize("NFD", "폴립.jpg")):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    paths, problems = label_with_text.images_to_label(tmp_path)
    assert [path.name for path in paths] == ["a.jpg", "b.PNG"]
    assert {unicodedata.normalize("NFC", name) for name in problems} == {"폴립.png", "폴립.jpg"}


def test_label_names_use_the_last_font_and_are_not_cut_off_at_the_top(monkeypatch):
    def drawn(top, *fonts):
        monkeypatch.setitem(label_with_text.plt.rcParams, "font.family", list(fonts))
        detections = sv.Detections(xyxy=np.array([[20, top, 150, 120]], float), mask=np.zeros((1, 160, 200), bool),
                                   confidence=np.ones(1), class_id=np.ones(1, int), data={"class_name": ["polyp"]})
        picture = label_with_text.draw(np.zeros((160, 200, 3), np.uint8), detections)
        return cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)

    sans, serif = drawn(60, "DejaVu Sans"), drawn(60, "DejaVu Serif")
    assert (sans != serif).any() and (drawn(60, "DejaVu Sans", "DejaVu Serif") == serif).all()
    letters = [(drawn(top, "DejaVu Sans").min(axis=2) > 200).sum() for top in (60, 0)]
    assert letters[0] == letters[1] > 20


def test_the_file_of_boxes_is_not_overwritten(tmp_path):
    draw_images(tmp_path)
    before = write_boxes(tmp_path / "photos/annotations.json", [], []).read_bytes()
    done = run(SCRIPT, "--images", "photos", "--boxes", "photos/annotations.json", *MODEL, "-o", "photos", cwd=tmp_path,
               code=2)
    assert "결과를 쓸 자리에 있습니다" in done.stderr
    assert (tmp_path / "photos/annotations.json").read_bytes() == before


def test_two_processes_write_the_same_json_as_one(tmp_path):
    boxes = draw_images(tmp_path, 5)
    (tmp_path / "photos" / "image_4.png").write_bytes(b"no image")
    coco = write_boxes(tmp_path / "boxes.json", [(number, 0, box, {}) for number, box in enumerate(boxes)],
                       [f"image_{number}.png" for number in range(5)])
    flags = ("--images", "photos", "--boxes", coco, "--plot", *MODEL)
    run(SCRIPT, *flags, "--output", "one", cwd=tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(ROOT / SCRIPT), *map(str, flags), "--output", "two"], cwd=tmp_path, env=ENV,
                          capture_output=True, encoding="utf-8", timeout=1200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("image_4.png - ") == done.stdout.count("저장: ") == 1  # only one process prints
    assert (tmp_path / "one" / "annotations.json").read_bytes() == (tmp_path / "two" / "annotations.json").read_bytes()
    assert len(list((tmp_path / "two" / "plots").iterdir())) == 4


def test_the_benchmark_prints_ratios(tmp_path):
    done = run("benchmarks/bench_labels.py", "--model-cfg", SMALL_CFG, "--boxes", 2, "--repeats", 1, "--device", "cpu",
               cwd=tmp_path)
    assert "2 boxes, cpu" in done.stdout and len(re.findall(r"ratio -?\d+\.\d\dx", done.stdout)) == 2
