"""SAM-Med3D with a representation head: masks from clicks, tokens for a language model, the ICH label."""

import contextlib
import io

import torch
from config import MODELS
from medim import create_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from utils import fail, load_checkpoint


class RepresentationHead(nn.Module):
    """Tokens from the encoder's features, and a haemorrhage logit for each token."""

    def __init__(self, channels, visual_tokens):
        super().__init__()
        self.project = nn.Linear(channels, visual_tokens)
        self.norm = nn.LayerNorm(visual_tokens)
        self.classify = nn.Sequential(nn.GELU(), nn.Linear(visual_tokens, 1))

    def forward(self, features):
        """features [B, channels, X, Y, Z] -> tokens [B, N, visual_tokens] with N = X * Y * Z, and logits [B, N].

        The logit of the volume is the largest of its N, because a small haemorrhage lies in few tokens.
        """
        tokens = self.norm(self.project(features.flatten(2).transpose(1, 2)))
        return tokens, self.classify(tokens)[..., 0]


class SamMed3dIch(nn.Module):
    """medim's SAM-Med3D as .sam, the representation head as .head."""

    def __init__(self, model_size, visual_tokens, freeze_encoder=False, use_gradient_checkpointing=False):
        super().__init__()
        with contextlib.redirect_stdout(io.StringIO()):  # medim prints the model's name
            self.sam = create_model("SAM-Med3D", **MODELS[model_size])
        self.head = RepresentationHead(self.sam.prompt_encoder.embed_dim, visual_tokens)
        self.recompute = use_gradient_checkpointing and not freeze_encoder
        self.sam.image_encoder.requires_grad_(not freeze_encoder)

    @property
    def low_res(self):
        """Side of the decoder's masks, and of the mask that it takes as a prompt."""
        return 4 * self.sam.prompt_encoder.image_embedding_size[0]

    def encode(self, image):
        """image [B, 1, S, S, S] -> features [B, C, S/P, S/P, S/P], P being the side of a patch."""
        encoder = self.sam.image_encoder
        if not (self.recompute and torch.is_grad_enabled()):
            return encoder(image)
        features = encoder.patch_embed(image) + encoder.pos_embed  # as in the encoder's own forward()
        for block in encoder.blocks:
            features = checkpoint(block, features, use_reentrant=False)
        return encoder.neck(features.permute(0, 4, 1, 2, 3))

    def decode(self, features, points, labels, low_res_mask=None):
        """Logits of one mask for each volume, [B, 1, L, L, L] with L = self.low_res.

        points: [B, N, 3], voxels in the order of torch.argwhere on the volume, as in SAM-Med3D's training.
            (medim encodes the positions of the features with the first two axes exchanged, and the published weights
            were trained with that.)
        labels: [B, N], 1 inside the target, 0 outside.
        low_res_mask: [B, 1, L, L, L], the logits from the previous click; None for the first, which means zeros.
        """
        if low_res_mask is None:
            low_res_mask = features.new_zeros(len(features), 1, *[self.low_res] * 3)
        sparse, dense = self.sam.prompt_encoder(points=(points, labels), boxes=None, masks=low_res_mask)
        logits, _ = self.sam.mask_decoder(
            image_embeddings=features, image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=False)
        return logits


def load_sam_checkpoint(sam, path):
    """Load SAM-Med3D's weights from the official form {"model_state_dict": ...}; fail() if they do not fit."""
    content = load_checkpoint(path)
    weights = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        fail(f"체크포인트에 'model_state_dict'가 없습니다: {path}")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()}
    differing = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if differing:
        shown = ", ".join(f"{name} (모델 {expected.get(name, '없음')}, 파일 {shapes.get(name, '없음')})"
                          for name in differing[:3])
        fail(f"체크포인트가 모델과 맞지 않습니다: {path}. 다른 항목 {len(differing)}개: {shown}")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        fail(f"체크포인트에 NaN이나 무한대가 있습니다: {path}")
    sam.load_state_dict(weights)


def build_model(args):
    """The model for these settings, with the weights of --sam_checkpoint or, without it, random ones from --seed."""
    torch.manual_seed(args.seed)
    model = SamMed3dIch(args.model_size, args.visual_tokens, args.freeze_encoder, args.use_gradient_checkpointing)
    if args.sam_checkpoint and not args.resume:
        load_sam_checkpoint(model.sam, args.sam_checkpoint)
    return model
