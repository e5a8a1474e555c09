"""Convert a SAM 2 between the official form and the form of Hugging Face transformers, and check the result.

    python extras/convert_checkpoint.py output/sam2_best.pt hf_model/        to Hugging Face
    python extras/convert_checkpoint.py hf_model/ sam2_from_hf.pt            and back

Sam2Model.from_pretrained, Sam2VideoModel.from_pretrained and pipeline("mask-generation") open the folder. The weights
are bit-identical in both forms. Nothing is written unless both models give the same masks for a synthetic image.

Chapters:
    settings              the names of the weights in both forms
    the run               main() and the command line
    to Hugging Face       the output folder and its settings
    to the official form  the output file
    weights               from one form's names and shapes to the other's
    comparison            both models on a synthetic image
"""

import argparse
import io
import json
import re
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch
from common import load_predictor, probe_image, read_config, trained_image_size
from files import fail, run, write_file
from hydra.utils import instantiate
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
    Sam2VisionConfig,
)
from transformers.models.sam2_video.configuration_sam2_video import (
    Sam2VideoMaskDecoderConfig,
    Sam2VideoPromptEncoderConfig,
)
from transformers.utils import logging

# ---- settings ----

LIMIT = 1e-3  # largest difference of logits that float32 rounding explains: same operations in another order
HF_MEMORY_CHANNELS = 64  # fixed in the code of Sam2VideoModel, regardless of its config
IMAGE_PARTS = ("image_encoder.", "sam_prompt_encoder.", "sam_mask_decoder.", "no_mem_embed")  # parts of Sam2Model

# (official name, Hugging Face name): whole components of a dotted name, "*" stands for a number. They are applied from
# top to bottom to convert to Hugging Face, and from bottom to top to convert back. General names come before those of
# one module, except where the name of a module would match a general one.
MLP_HEADS = ("output_hypernetworks_mlps.*", "iou_prediction_head", "pred_obj_score_head", "object_pointer_proj")
RENAMED = [
    ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    ("no_mem_embed", "no_memory_embedding"),
    ("no_mem_pos_enc", "no_memory_positional_encoding"),
    ("no_obj_ptr", "no_object_pointer"),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    ("obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
    ("obj_ptr_proj", "object_pointer_proj"),
    ("image_encoder.trunk", "vision_encoder.backbone"),
    ("image_encoder.neck.convs.*.conv", "vision_encoder.neck.convs.*"),
    ("patch_embed.proj", "patch_embed.projection"),
    ("sam_prompt_encoder", "prompt_encoder"),
    ("sam_mask_decoder", "mask_decoder"),
    ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    ("memory_encoder.out_proj", "memory_encoder.projection"),
    ("memory_encoder.pix_feat_proj", "memory_encoder.feature_projection"),
    ("memory_encoder.fuser", "memory_encoder.memory_fuser"),
    ("dwconv", "depthwise_conv"),
    ("pwconv1", "pointwise_conv1"),
    ("pwconv2", "pointwise_conv2"),
    ("gamma", "scale"),
    ("out_proj", "o_proj"),
    ("norm", "layer_norm"),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("norm3", "layer_norm3"),
    ("norm4", "layer_norm4"),
    ("norm_final_attn", "layer_norm_final_attn"),
    ("mlp.layers.0", "mlp.proj_in"),
    ("mlp.layers.1", "mlp.proj_out"),
    *((f"{head}.layers.{official}", f"{head}.{huggingface}") for head in MLP_HEADS
      for official, huggingface in enumerate(("proj_in", "layers.0", "proj_out"))),
    ("output_upscaling.0", "upscale_conv1"),
    ("output_upscaling.1", "upscale_layer_norm"),
    ("output_upscaling.3", "upscale_conv2"),
    ("mask_downscaling.0", "mask_embed.conv1"),
    ("mask_downscaling.1", "mask_embed.layer_norm1"),
    ("mask_downscaling.3", "mask_embed.conv2"),
    ("mask_downscaling.4", "mask_embed.layer_norm2"),
    ("mask_downscaling.6", "mask_embed.conv3"),
    *((f"mask_downsampler.encoder.{3 * layer + place}", f"mask_downsampler.layers.{layer}.{part}")
      for layer in range(4) for place, part in enumerate(("conv", "layer_norm"))),
    ("mask_downsampler.encoder.12", "mask_downsampler.final_conv"),
]


# ---- the run ----


def main():
    args = parse_args()
    if args.source.is_dir():
        to_official(args)
    else:
        to_huggingface(args)


def parse_args():
    parser = argparse.ArgumentParser(description="SAM 2 체크포인트를 공식 형식과 Hugging Face 형식 사이에서 바꿉니다.")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="공식 체크포인트(.pt) 또는 Hugging Face 폴더")
    parser.add_argument("target", type=Path, metavar="TARGET", help="만들 폴더, 또는 (SOURCE가 폴더일 때) 만들 파일")
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml",
                        help="모델 설정 이름 또는 YAML 경로 (기본: configs/sam2.1/sam2.1_hiera_s.yaml)")
    parser.add_argument("--image-size", type=int, choices=[512, 768, 1024],
                        help="공식 체크포인트일 때, 모델 입력 한 변 (기본: 체크포인트에 적힌 대로, 없으면 설정대로)")
    parser.add_argument("--checkpoint", type=Path,
                        help="Sam2Model로 저장해 메모리(비디오) 부분이 없는 폴더일 때, 그것을 가져올 공식 체크포인트")
    args = parser.parse_args()
    if args.source.is_dir() and args.image_size:
        parser.error("--image-size는 공식 체크포인트를 바꿀 때만 씁니다")
    if args.source.is_file() and args.checkpoint:
        parser.error("--checkpoint는 Hugging Face 폴더를 바꿀 때만 씁니다")
    return args


# ---- to Hugging Face ----


def to_huggingface(args):
    """Convert an official checkpoint to a folder, which gets its final name only after the check."""
    if args.target.exists() and not args.target.is_dir():
        fail(f"{args.target}: 폴더여야 하는데 파일이 있습니다")
    predictor = load_predictor(args.model_cfg, args.source, "cpu", args.image_size or trained_image_size(args.source))
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{args.target.name}.", dir=args.target.parent) as name:
        folder = Path(name)
        save_folder(predictor.model, folder)
        has_video = check_video_model(predictor.model, folder)
        report_difference(predictor, folder, args.target)
        args.target.mkdir(exist_ok=True)
        replaced = sorted(file.name for file in folder.iterdir() if (args.target / file.name).exists())
        if replaced:
            print(f"주의: {args.target}에 있던 파일을 바꿉니다: {', '.join(replaced)}")
        for file in folder.iterdir():
            file.replace(args.target / file.name)
    print(f"저장: {args.target} (파라미터 {sum(p.numel() for p in predictor.model.parameters()):,}개, "
          f"입력 {predictor.model.image_size}px)")
    print(f'열기: transformers.Sam2Model.from_pretrained("{args.target}")'
          + (", Sam2VideoModel도 같은 방식" if has_video else ""))


def save_folder(model, folder):
    """Write config.json, model.safetensors and the processor's files of an official SAM 2 into `folder`."""
    weights = huggingface_weights(model.state_dict())
    config = huggingface_config(model)
    check_shapes(weights, expected_shapes(config), "transformers의 SAM 2와 구조가 달라 변환할 수 없습니다")
    config.save_pretrained(folder)
    write_file(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    make_processor(model.image_size).save_pretrained(folder)


def make_processor(image_size):
    """The processor that resizes and normalizes images and scales prompts for this input size in pixels."""
    size, mask_size = ({"height": side, "width": side} for side in (image_size, image_size // 4))
    return Sam2VideoProcessor(Sam2ImageProcessor(size=size, mask_size=mask_size), Sam2VideoVideoProcessor(size=size),
                              target_size=image_size)


def huggingface_config(model):
    """The Sam2VideoConfig of an official SAM 2, with all sizes taken from the modules instead of the YAML file."""
    trunk, neck = model.image_encoder.trunk, model.image_encoder.neck
    decoder, attention, memory = model.sam_mask_decoder, model.memory_attention, model.memory_encoder
    two_way, layer, fuser = decoder.transformer, attention.layers[0], memory.fuser.layers
    downsample = memory.mask_downsampler.encoder[0]
    ends = [trunk.blocks[end] for end in trunk.stage_ends]
    last_mlp = ends[-1].mlp.layers[0]
    backbone = Sam2HieraDetConfig(
        hidden_size=trunk.patch_embed.proj.out_channels,
        num_attention_heads=trunk.blocks[0].attn.num_heads,
        image_size=[model.image_size, model.image_size],
        query_stride=list(trunk.q_stride),
        num_query_pool_stages=len(trunk.q_pool_blocks),
        window_positional_embedding_background_size=list(trunk.window_pos_embed_bkg_spatial_size),
        blocks_per_stage=np.diff([-1, *trunk.stage_ends]).tolist(),
        embed_dim_per_stage=[block.dim_out for block in ends],
        num_attention_heads_per_stage=[block.attn.num_heads for block in ends],
        window_size_per_stage=list(trunk.window_spec),
        global_attention_blocks=list(trunk.global_att_blocks or []),
        mlp_ratio=last_mlp.out_features / last_mlp.in_features,
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=list(neck.backbone_channel_list),
        backbone_feature_sizes=[[model.image_size // stride] * 2 for stride in (4, 8, 16)],
        fpn_hidden_size=neck.d_model,
        fpn_top_down_levels=list(neck.fpn_top_down_levels),
    )
    prompt = Sam2VideoPromptEncoderConfig(hidden_size=model.hidden_dim, image_size=model.image_size,
                                          patch_size=model.backbone_stride)
    mask = Sam2VideoMaskDecoderConfig(
        hidden_size=model.hidden_dim,
        mlp_dim=two_way.layers[0].mlp.layers[0].out_features,
        num_hidden_layers=two_way.depth,
        num_attention_heads=two_way.num_heads,
        attention_downsample_rate=model.hidden_dim // two_way.final_attn_token_to_image.internal_dim,
        iou_head_hidden_dim=decoder.iou_prediction_head.layers[0].out_features,
    )
    return Sam2VideoConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask,
        architectures=["Sam2VideoModel"], dtype="float32", image_size=model.image_size,
        num_maskmem=model.num_maskmem,
        sigmoid_scale_for_mem_enc=model.sigmoid_scale_for_mem_enc,
        sigmoid_bias_for_mem_enc=model.sigmoid_bias_for_mem_enc,
        enable_occlusion_spatial_embedding=model.no_obj_embed_spatial is not None,
        multimask_output_in_sam=model.multimask_output_in_sam,
        multimask_min_pt_num=model.multimask_min_pt_num,
        multimask_max_pt_num=model.multimask_max_pt_num,
        multimask_output_for_tracking=model.multimask_output_for_tracking,
        max_object_pointers_in_encoder=model.max_obj_ptrs_in_encoder,
        max_cond_frame_num=model.max_cond_frames_in_attn,
        enable_temporal_pos_encoding_for_object_pointers=model.proj_tpos_enc_in_obj_ptrs,
        memory_attention_hidden_size=attention.d_model,
        memory_attention_num_layers=attention.num_layers,
        memory_attention_num_attention_heads=layer.self_attn.num_heads,
        memory_attention_downsample_rate=attention.d_model // layer.self_attn.internal_dim,
        memory_attention_feed_forward_hidden_size=layer.dim_feedforward,
        memory_attention_feed_forward_hidden_act=layer.activation_str,
        memory_attention_dropout=layer.dropout_value,
        memory_attention_rope_feat_sizes=[model.image_size // model.backbone_stride] * 2,
        memory_attention_rope_dropout=layer.self_attn.dropout_p,
        rope_parameters={"rope_type": "axial", "rope_theta": layer.self_attn.compute_cis.keywords["theta"]},
        memory_encoder_hidden_size=memory.pix_feat_proj.in_channels,
        memory_encoder_output_channels=model.mem_dim,
        mask_downsampler_embed_dim=memory.mask_downsampler.encoder[-1].out_channels,
        mask_downsampler_kernel_size=downsample.kernel_size[0],
        mask_downsampler_stride=downsample.stride[0],
        mask_downsampler_padding=downsample.padding[0],
        memory_fuser_num_layers=len(fuser),
        memory_fuser_embed_dim=fuser[0].dwconv.in_channels,
        memory_fuser_intermediate_dim=fuser[0].pwconv1.out_features,
        memory_fuser_kernel_size=fuser[0].dwconv.kernel_size[0],
        memory_fuser_padding=fuser[0].dwconv.padding[0],
    )


# ---- to the official form ----


def to_official(args):
    """Convert a Hugging Face folder to an official checkpoint, which gets its final name only after the check."""
    if args.target.is_dir():
        fail(f"{args.target}: 파일이어야 하는데 폴더가 있습니다")
    image_size = read_image_size(args.source)
    try:
        weights = weights_from_huggingface(load_file(args.source / "model.safetensors"))
    except FileNotFoundError:
        fail(f"{args.source}: model.safetensors가 없습니다 (.bin 파일은 읽지 않습니다)")
    except (SafetensorError, KeyError) as error:
        fail(f"{args.source / 'model.safetensors'}: SAM 2의 가중치가 아니거나 손상되었습니다 "
             f"({textwrap.shorten(str(error), 100)})")
    if "maskmem_tpos_enc" not in weights:
        weights = {**memory_part(args), **weights}
    check_shapes(weights, official_shapes(args.model_cfg), f"{args.source}: 맞지 않는 설정 {args.model_cfg}")
    content = io.BytesIO()  # torch.save to a path raises RuntimeError, not OSError, if it cannot write
    torch.save({"model": weights, "image_size": image_size}, content)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{args.target.name}.", dir=args.target.parent) as name:
        checkpoint = Path(name) / args.target.name
        write_file(checkpoint, content.getbuffer())
        predictor = load_predictor(args.model_cfg, checkpoint, "cpu", image_size)
        report_difference(predictor, args.source, args.target)
        checkpoint.replace(args.target)
    print(f"저장: {args.target} (파라미터 {sum(p.numel() for p in predictor.model.parameters()):,}개, "
          f"입력 {image_size}px)")


def official_shapes(model_cfg):
    """{name: shape} of the tensors of the sam2 model with this config."""
    model = instantiate(read_config(model_cfg), _recursive_=True)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def read_image_size(folder):
    """The input size in pixels in the config of a folder; fails if the folder does not hold a SAM 2."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        fail(f"{folder}: config.json이 없습니다. save_pretrained가 만든 폴더가 아닙니다")
    except (ValueError, AttributeError):
        fail(f"{folder / 'config.json'}: JSON이 아니거나 손상되었습니다")
    if kind not in ("sam2", "sam2_video"):
        fail(f"{folder}: SAM 2가 아니라 {kind}의 폴더입니다 (sam2, sam2_video만 변환합니다)")
    try:
        config = (Sam2Config if kind == "sam2" else Sam2VideoConfig).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each class of the config's parts raises its own errors
        fail(f"{folder / 'config.json'}: 열 수 없습니다 ({textwrap.shorten(str(error), 200)})")
    return config.prompt_encoder_config.image_size


def memory_part(args):
    """The tensors of args.checkpoint that only video uses, {name: tensor}, for a folder with an image model."""
    if not args.checkpoint:
        fail(f"{args.source}: Sam2Model로 저장되어 메모리(비디오) 부분이 없습니다. "
             "--checkpoint에 파인튜닝 전의 공식 체크포인트를 주면 그 부분을 가져옵니다")
    official = load_predictor(args.model_cfg, args.checkpoint, "cpu").model.state_dict()
    return {name: tensor for name, tensor in official.items() if not name.startswith(IMAGE_PARTS)}


# ---- weights ----


def huggingface_weights(official):
    """Rename the tensors of an official state dict. The four point embeddings become one tensor, and the positional
    embedding of the prompt encoder is stored a second time for the image."""
    weights = {rename(name, RENAMED): tensor.contiguous() for name, tensor in official.items()
               if ".point_embeddings." not in name}
    points = [official[f"sam_prompt_encoder.point_embeddings.{number}.weight"] for number in range(4)]
    weights["prompt_encoder.point_embed.weight"] = torch.cat(points)
    shared = weights["prompt_encoder.shared_embedding.positional_embedding"]
    weights["shared_image_embedding.positional_embedding"] = shared.clone()
    return weights


def weights_from_huggingface(huggingface):
    """The inverse of huggingface_weights, in float32."""
    back = [(new, old) for old, new in reversed(RENAMED)]
    weights = {rename(name, back): tensor.float().contiguous() for name, tensor in huggingface.items()
               if name not in ("prompt_encoder.point_embed.weight", "shared_image_embedding.positional_embedding")}
    for number, point in enumerate(huggingface["prompt_encoder.point_embed.weight"].float().split(1)):
        weights[f"sam_prompt_encoder.point_embeddings.{number}.weight"] = point.clone()
    return weights


def rename(name, pairs):
    """Apply `pairs` of (old, new) components to a dotted name, in order; the number at "*" is kept."""
    for old, new in pairs:
        pattern = re.escape(old).replace(r"\*", r"(\d+)")
        name = re.sub(rf"(?<![^.]){pattern}(?![^.])", new.replace("*", r"\1"), name)
    return name


def expected_shapes(config):
    """{name: shape} of the tensors of a Sam2VideoModel with this config. The values are not allocated."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Sam2VideoModel(config).state_dict().items()}
    for name, shape in shapes.items():
        if re.search(r"cross_attn_image\.[kv]_proj\.weight", name):  # see check_video_model
            shapes[name] = torch.Size((shape[0], config.memory_encoder_output_channels))
    return shapes


def check_shapes(weights, expected, problem):
    """Fail unless the tensors in `weights` have the expected names and shapes.

    expected: {name: shape}; problem: the beginning of the error message.
    """
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    differing = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if differing:
        fail(f"{problem}. 다른 항목 {len(differing)}개: {', '.join(differing[:3])}")


# ---- comparison ----


def report_difference(predictor, folder, target):
    """Print the largest difference between both forms on a synthetic image; fail if it is above LIMIT."""
    difference = largest_difference(predictor, folder)
    print(f"두 모델의 로짓과 점수의 최대 차이 (점, 상자): {difference:.1e}")
    if not difference <= LIMIT:  # also if it is NaN
        fail(f"{target}: 두 모델의 결과가 {LIMIT:g}보다 많이 달라 저장하지 않았습니다. "
             "설정(--model-cfg, --image-size)이 이 가중치의 것인지 확인하세요")


@torch.inference_mode()
def largest_difference(predictor, folder):
    """Segment a synthetic image with the official model and the folder's model, from a point and from a box.

    Returns the largest absolute difference of the low-resolution logits (clamped to ±32, as sam2 returns them) and
    of the predicted scores. The image has the model's input size, because resizing differs: sam2 resizes
    floating-point pixels, transformers 8-bit ones.
    """
    side = predictor.model.image_size
    processor, model = make_processor(side), open_folder(Sam2Model, folder)
    image = probe_image(side)
    point, box = [side * 0.4, side * 0.45], [side * 0.2, side * 0.25, side * 0.7, side * 0.75]
    predictor.set_image(image)
    official = [predictor.predict(point_coords=np.array([point]), point_labels=np.array([1]), multimask_output=True),
                predictor.predict(box=np.array(box), multimask_output=True)]
    prompts = [{"input_points": [[[point]]], "input_labels": [[[1]]]}, {"input_boxes": [[box]]}]
    differences = []
    for (_, scores, logits), prompt in zip(official, prompts):
        outputs = model(**processor(images=image, return_tensors="pt", **prompt), multimask_output=True)
        differences.append(np.abs(outputs.pred_masks[0, 0].clamp(-32, 32).numpy() - logits).max())
        differences.append(np.abs(outputs.iou_scores[0, 0].numpy() - scores).max())
    return float(np.max(differences))


def open_folder(kind, folder):
    """Load a transformers model of class `kind` in float32 and eval mode; fails if weights and config do not match."""
    try:
        model, info = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32,
                                           output_loading_info=True)
    except Exception as error:  # transformers and safetensors each raise their own errors
        fail(f"{folder}: {kind.__name__} 모델로 열 수 없습니다 ({textwrap.shorten(str(error), 200)})")
    if info["missing_keys"]:
        fail(f"{folder}: {kind.__name__}에 필요한 가중치가 없습니다: {', '.join(sorted(info['missing_keys'])[:3])}")
    return model.eval()


def check_video_model(model, folder):
    """Whether Sam2VideoModel can open the folder; prints a warning if the number of memory channels differs.

    Fails if it cannot open the folder for another reason.
    """
    if model.mem_dim != HF_MEMORY_CHANNELS:
        print(f"주의: transformers의 Sam2VideoModel은 메모리 채널이 {HF_MEMORY_CHANNELS}개인 모델만 엽니다 "
              f"(이 모델은 {model.mem_dim}개). 폴더는 Sam2Model로 열립니다")
        return False
    open_folder(Sam2VideoModel, folder)
    return True


if __name__ == "__main__":
    logging.set_verbosity_error()  # Sam2Model warns about the memory weights, which it ignores on purpose
    logging.disable_progress_bar()
    run(main, "더 작은 모델로 해 보거나 다른 프로그램을 닫으세요")
