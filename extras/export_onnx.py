"""Export a SAM 2 checkpoint as two ONNX files, image encoder and mask decoder, and check them with ONNX Runtime.

    python extras/export_onnx.py output/sam2_best.pt onnx/        sam2_best.encoder.onnx, sam2_best.decoder.onnx

Names, order and shapes of inputs and outputs are those of samexporter 0.5, so that tools for its SAM 2 files
(X-AnyLabeling and others) can open these files. Nothing is written unless ONNX Runtime and torch give the same logits
for a synthetic image.

    encoder   image 1x3xSxS, normalized RGB; S: the model's image_size
              -> high_res_feats_0 1xCxS/4xS/4, high_res_feats_1 1xCxS/8xS/8, image_embed 1xCxS/16xS/16
    decoder   image_embed, high_res_feats_0, high_res_feats_1, point_coords NxKx2 (x, y in pixels of the SxS image),
              point_labels NxK, mask_input Nx1xS/4xS/4 (logits), has_mask_input N (0 or 1)
              -> masks Nx3xS/4xS/4 (logits, -32 to 32), iou_predictions Nx3

All are float32, for N objects with K points each. Labels: 1 object, 0 background, 2 and 3 the top left and bottom right
corner of a box, -1 no prompt.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from common import load_predictor, probe_image, trained_image_size
from files import fail, run, write_file
from onnxruntime.quantization import QuantType, quantize_dynamic

LIMIT = 1e-3  # largest difference of logits that float32 rounding explains
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of sam2.utils.transforms, RGB
FEATURES = ["high_res_feats_0", "high_res_feats_1", "image_embed"]
PROMPTS = {"point_coords": {0: "num_labels", 1: "num_points"}, "point_labels": {0: "num_labels", 1: "num_points"},
           "mask_input": {0: "num_labels"}, "has_mask_input": {0: "num_labels"}}  # samexporter's names of dimensions
RESULTS = {"masks": {0: "num_labels"}, "iou_predictions": {0: "num_labels"}}


def main():
    args = parse_args()
    predictor = load_predictor(args.model_cfg, args.checkpoint, "cpu", trained_image_size(args.checkpoint))
    if not predictor.model.use_high_res_features_in_sam:
        fail(f"{args.model_cfg}: use_high_res_features_in_sam이 true인 설정만 내보냅니다 (SAM 2의 모든 설정)")
    if predictor.model.knows_absence:
        print("주의: 프롬프트가 없을 때 대상이 없다고 판단하는 점수는 ONNX 파일에 없습니다 (test_my_image.py에는 있음)")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        encoder, decoder = Path(folder, "encoder.onnx"), Path(folder, "decoder.onnx")
        export_files(predictor.model, encoder, decoder)
        difference = report_files(predictor, encoder, decoder, "float32")
        if not difference < LIMIT:  # also if it is NaN
            fail(f"ONNX Runtime의 결과가 torch와 {LIMIT:g} 이상 달라 저장하지 않았습니다: {args.out_dir}")
        if args.fp16 or args.int8:
            (halve_weights if args.fp16 else quantize_weights)(encoder)
            report_files(predictor, encoder, decoder, "fp16" if args.fp16 else "int8")
        for path in (encoder, decoder):
            target = args.out_dir / f"{args.checkpoint.stem}.{path.name}"
            replaced = " (있던 파일을 바꿈)" if target.exists() else ""
            write_file(target, path.read_bytes())
            print(f"저장: {target}{replaced}")


def parse_args():
    parser = argparse.ArgumentParser(description="SAM 2를 ONNX 파일 두 개(이미지 인코더, 마스크 디코더)로 내보냅니다.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="공식 형식의 체크포인트(.pt)")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="두 파일을 저장할 폴더")
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml",
                        help="모델 설정 이름 또는 YAML 경로 (기본: configs/sam2.1/sam2.1_hiera_s.yaml)")
    smaller = parser.add_mutually_exclusive_group()
    smaller.add_argument("--fp16", action="store_true", help="인코더의 가중치를 16비트로 저장 (계산은 32비트)")
    smaller.add_argument("--int8", action="store_true", help="인코더의 행렬곱을 8비트로 (가장 작지만 결과가 조금 다름)")
    return parser.parse_args()


class Encoder(torch.nn.Module):
    """What SAM2ImagePredictor.set_image computes from a normalized image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        fine, middle, embed = self.model.forward_image(image)["backbone_fpn"][-3:]
        if self.model.directly_add_no_mem_embed:
            embed = embed + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return fine, middle, embed


class Decoder(torch.nn.Module):
    """What SAM2ImagePredictor.predict computes, with three masks, for N objects in one image."""

    def __init__(self, model):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = model.sam_prompt_encoder, model.sam_mask_decoder

    def forward(self, embed, fine, middle, coords, labels, mask, has_mask):
        sparse, dense = self.prompt_encoder(points=(coords, labels), boxes=None, masks=mask)
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        masks, scores, _, _ = self.mask_decoder(
            image_embeddings=embed, image_pe=self.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=torch.where(has_mask.reshape(-1, 1, 1, 1) > 0, dense, no_mask),
            multimask_output=True, repeat_image=True, high_res_features=[fine, middle])
        return masks.clamp(-32, 32), scores


@torch.no_grad()
def export_files(model, encoder, decoder):
    """Write the two ONNX files of a SAM2Base to the paths `encoder` and `decoder`."""
    image = torch.zeros(1, 3, model.image_size, model.image_size)
    fine, middle, embed = Encoder(model)(image)
    export(Encoder(model), (image,), encoder, ["image"], FEATURES, {})
    mask = torch.zeros(2, 1, *model.sam_prompt_encoder.mask_input_size)
    prompts = (torch.zeros(2, 3, 2), torch.ones(2, 3), mask, torch.ones(2))
    export(Decoder(model), (embed, fine, middle, *prompts), decoder, [FEATURES[2], *FEATURES[:2], *PROMPTS],
           [*RESULTS], {**PROMPTS, **RESULTS})


def export(module, inputs, path, input_names, output_names, dynamic_axes):
    """Export a module by tracing: torch.export (dynamo=True) fails on a dynamic N and needs one more package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of each shape that becomes constant: all except N and K
        torch.onnx.export(module, inputs, path, input_names=input_names, output_names=output_names,
                          dynamic_axes=dynamic_axes, opset_version=18, dynamo=False)
    model = onnx.load(path)
    for node in model.graph.node:
        for branch in node.attribute if node.op_type == "If" else ():  # of Tensor.tile; ONNX Runtime warns of the shape
            for output in branch.g.output:  # of the branch that never runs
                output.type.tensor_type.ClearField("shape")
    onnx.save(model, path)


def halve_weights(path):
    """Store the weights of an ONNX file as float16. They are cast to float32 before use: no activation overflows.

    Fails if a weight is out of the range of float16.
    """
    model = onnx.load(path)
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            name, values = weight.name, onnx.numpy_helper.to_array(weight)
            if not np.abs(values).max(initial=0) <= np.finfo(np.float16).max:
                fail(f"fp16의 범위(±65504)를 벗어난 가중치가 있습니다: {name}. --fp16 없이 내보내세요")
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.fp16"))
            cast = onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, cast)
    onnx.save(model, path)


def quantize_weights(path):
    """Quantize the matrix products of an ONNX file: weights to 8 bits per channel, activations while it runs."""
    quantize_dynamic(onnx.load(path), path, ["MatMul"], per_channel=True,
                     weight_type=QuantType.QUInt8)  # signed weights saturate on CPUs without VNNI


def report_files(predictor, encoder, decoder, precision):
    """Print the files' sizes and the largest difference between them and torch, and return it."""
    difference = difference_from_torch(predictor, encoder, decoder)
    sizes = ", ".join(f"{name} {path.stat().st_size / 1e6:.1f} MB"
                      for name, path in (("인코더", encoder), ("디코더", decoder)))
    print(f"{precision}: {sizes}, 로짓과 점수의 최대 차이 {difference:.1e}")
    return difference


def difference_from_torch(predictor, encoder, decoder):
    """Segment a synthetic image with a SAM2ImagePredictor and with the ONNX files, from prompts of every kind.

    Returns the largest absolute difference of the low-resolution logits (clamped to ±32, as sam2 returns them) and of
    the scores. A mask can differ only where a logit is closer to 0 than this. The image has the model's input size,
    because resizing is not part of the files.
    """
    side = predictor.model.image_size
    image = probe_image(side)
    predictor.set_image(image)
    encoder, decoder = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                        for path in (encoder, decoder))
    normalized = ((image / 255 - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32)
    features = dict(zip(FEATURES, encoder.run(FEATURES, {"image": normalized})))
    point, other, top_left, bottom_right = [0.4, 0.45], [0.9, 0.1], [0.2, 0.25], [0.7, 0.75]
    no_mask = np.zeros((1, *predictor.model.sam_prompt_encoder.mask_input_size), np.float32)
    mask = no_mask - 10
    mask[:, :len(mask[0]) // 2] = 10
    prompts = [  # points of each object, their labels, rough mask
        ([[point]], [[1]], None), ([[top_left, bottom_right, point, other]], [[2, 3, 1, 0]], None),
        ([[top_left, bottom_right]], [[2, 3]], mask), ([[[0, 0]]], [[-1]], None),
        ([[point, other], [other, point]], [[1, 0], [1, 0]], None)]
    differences = []
    for coords, labels, rough in prompts:
        coords, labels = np.array(coords, np.float32) * side, np.array(labels, np.float32)
        _, expected_scores, expected_logits = predictor.predict(coords, labels, mask_input=rough, multimask_output=True)
        masks = np.repeat((no_mask if rough is None else rough)[None], len(coords), axis=0)
        inputs = (coords, labels, masks, np.full(len(coords), rough is not None, np.float32))
        logits, scores = decoder.run([*RESULTS], {**features, **dict(zip(PROMPTS, inputs))})
        differences += [np.abs(logits - expected_logits).max(), np.abs(scores - expected_scores).max()]
    return float(np.max(differences))


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # hides quantize_dynamic's advice to fold constants first, which enlarges the file
    run(main, "더 작은 모델로 해 보거나 다른 프로그램을 닫으세요")
