"""Pre-train demo/sam2_demo.pt: a 2 M-parameter SAM 2 that segments what one clicks on.

    python demo/make_demo_model.py

The demo must run without a network, so its model cannot be one of Meta's. This script trains a small
one from random weights, out of the classes in the sam2 package (demo/sam2_demo.yaml), on scenes that it
draws itself: one to eight overlapping shapes of any colour, texture and softness of edge. A scene holds
several objects, so the picture alone does not say what to segment; only the prompt does. That is what
makes the model promptable. Nothing in the scenes imitates the fine-tuning domain (make_demo_data.py).

The first steps run at 128 px, the last at 256 px: SAM 2's weights do not depend on the image size, and
a step at 256 costs four times as much.

The run that made the tracked file (seed 0, 2 CPU cores shared with other work, 2026-11-21) took 101 minutes
and reached on 200 held-out scenes, 8 prompts each, with the mask of the highest predicted score, a mean
IoU of 0.682 for one click and 0.788 for a box.
"""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

HERE = Path(__file__).resolve().parent
PHASES = ((128, 10000), (256, 3500))  # image size in pixels, steps
SCENES = 8          # scenes in a step: each is encoded once
PROMPTS = 8         # objects asked for in each scene: each is decoded once
LR = 1e-3
WARMUP = 600        # steps over which the learning rate grows to LR
DISC_STEPS = 400    # first of all: segment a disc around the click, see disc_around
DISC_RADIUS = 20    # pixels
WEIGHT_DECAY = 0.01
HELD_OUT_SEED = 10**9  # training uses seeds from 0 up; the held-out scenes start here
MIN_PIXELS = 40     # an object with less left in sight is never asked for (at 128 px)


# ----------------------------------------------------------------------------- scenes

def value_noise(rng, size, cells):
    """Smooth noise, float32 size x size in about [-1, 1], with `cells` bumps along a side."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def texture(rng, size, colour):
    """A textured field around `colour`: float32 size x size x 3, 0 to 255."""
    field = np.broadcast_to(colour.astype(np.float32), (size, size, 3)).copy()
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 50)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    field += (slope * (x * np.cos(angle) + y * np.sin(angle)))[..., None]
    field += (rng.uniform(0, 30) * value_noise(rng, size, int(rng.integers(3, 20))))[..., None]
    kind = rng.random()
    if kind < 0.25:  # stripes
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(20, 90))
        field += (rng.uniform(5, 35) * wave)[..., None] * rng.uniform(0.3, 1, 3)
    elif kind < 0.5:  # blotches of a second tint
        tint = rng.uniform(-40, 40, 3)
        field += (value_noise(rng, size, int(rng.integers(5, 12))) > 0.2)[..., None] * tint
    return field


def outline(rng, size):
    """A random closed outline: N x 2 points in pixels. Blobs mostly, also polygons and rectangles."""
    radius = size * np.exp(rng.uniform(np.log(0.08), np.log(0.4)))
    centre = rng.uniform(0.05, 0.95, 2) * size
    turn, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 1)
    kind = rng.random()
    if kind < 0.7:
        angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        reach = np.ones_like(angle)
        for wave in range(2, 7):
            reach += rng.normal(0, 0.35 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
        reach = np.clip(reach, 0.3, None)
    elif kind < 0.85:
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
        reach = rng.uniform(0.7, 1.1, len(angle))
    else:
        corner = rng.uniform(0.4, 1.1)
        angle = np.array([corner, np.pi - corner, np.pi + corner, 2 * np.pi - corner])
        reach = np.ones(4)
    points = np.stack([np.cos(angle), squeeze * np.sin(angle)], 1) * (reach * radius)[:, None]
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points @ rotation.T + centre


def draw_scene(rng, size):
    """Draw one scene.

    Returns:
        image: uint8 size x size x 3, RGB.
        labels: uint8 size x size; 0 is background, k the part of object k that is in sight.
    """
    ground = rng.uniform(20, 235, 3)
    image = texture(rng, size, ground)
    labels = np.zeros((size, size), np.uint8)
    for number in range(1, rng.integers(1, 9) + 1):
        shift = rng.normal(0, 1, 3)
        contrast = np.exp(rng.uniform(np.log(12), np.log(160)))
        colour = np.clip(ground + contrast * shift / np.linalg.norm(shift), 5, 250)
        inside = np.zeros((size, size), np.uint8)
        points = np.round(outline(rng, size) * 16).astype(np.int32)
        cv2.fillPoly(inside, [points], 255, lineType=cv2.LINE_AA, shift=4)
        softness = size / 128 * rng.uniform(0.3, 2.5)
        alpha = cv2.GaussianBlur(inside.astype(np.float32) / 255, (0, 0), softness)[..., None]
        if rng.random() < 0.4:  # a shadow, or a rim of light, around the object
            glow = cv2.GaussianBlur(inside.astype(np.float32) / 255, (0, 0), 3 * softness + 1)
            image += (rng.uniform(-40, 25) * glow)[..., None]
        surface = texture(rng, size, colour)
        if rng.random() < 0.5:  # rounded: brighter in the middle than at the edge
            dome = cv2.GaussianBlur(inside.astype(np.float32) / 255, (0, 0), size * 0.06)
            surface += (rng.uniform(0, 60) * (dome - 0.6))[..., None]
        image = alpha * surface + (1 - alpha) * image
        labels[inside > 127] = number

    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    image *= (1 - rng.uniform(0, 0.8) * (x * x + y * y))[..., None]
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), size / 128 * rng.uniform(0.4, 1.2))
    image += rng.normal(0, rng.uniform(0, 8), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), labels


class Scenes(Dataset):
    """Item i: (image 3 x S x S float32 in [0, 1], masks PROMPTS x S x S bool), drawn from seed + i."""

    def __init__(self, size, count, seed):
        self.size, self.count, self.seed = size, count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        cv2.setNumThreads(1)  # the other cores belong to the training
        rng = np.random.default_rng(self.seed + index)
        objects = []
        while not objects:
            image, labels = draw_scene(rng, self.size)
            sizes = np.bincount(labels.ravel())
            enough = MIN_PIXELS * (self.size / 128) ** 2
            objects = [k for k in range(1, len(sizes)) if sizes[k] >= enough]
        asked = rng.permutation(np.resize(rng.permutation(objects), PROMPTS))
        masks = labels[None] == asked[:, None, None]
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255, torch.from_numpy(masks)


# ----------------------------------------------------------------------------- prompts

def random_pixels(where):
    """One random true pixel of each mask: N x S x S bool -> N x 2 float, (x, y) in pixels.

    A mask without a true pixel gives a random pixel of the image.
    """
    weight = where.flatten(1).float()
    weight[weight.sum(1) == 0] = 1
    index = torch.multinomial(weight, 1).squeeze(1)
    side = where.shape[-1]
    return torch.stack([index % side, index // side], 1).float()


def click_prompt(masks, clicks):
    """The first click on the object; the others one half on it, one half (label 0) beside it."""
    coords, labels = [random_pixels(masks)], [torch.ones(len(masks))]
    for _ in range(clicks - 1):
        positive = torch.rand(len(masks)) < 0.5
        coords.append(random_pixels(torch.where(positive[:, None, None], masks, ~masks)))
        labels.append(positive.float())
    return torch.stack(coords, 1), torch.stack(labels, 1)


def box_prompt(masks):
    """The mask's box, each side moved by up to 10 % of its length; corners carry labels 2 and 3."""
    columns, rows = masks.any(1), masks.any(2)
    side = masks.shape[-1]
    x1, y1 = columns.float().argmax(1), rows.float().argmax(1)
    x2 = side - 1 - columns.flip(1).float().argmax(1)
    y2 = side - 1 - rows.flip(1).float().argmax(1)
    box = torch.stack([x1, y1, x2, y2], 1).float()
    extent = torch.stack([x2 - x1, y2 - y1, x2 - x1, y2 - y1], 1).float()
    box = (box + (torch.rand_like(box) - 0.5) * 0.2 * extent).clamp(0, side - 1)
    return box.view(-1, 2, 2), torch.tensor([[2.0, 3.0]]).expand(len(masks), 2)


# ----------------------------------------------------------------------------- training

def encode(model, images):
    """Images 3 x S x S in [0, 1] -> [stride 4, stride 8, stride 16] feature maps, as set_image makes them."""
    mean = images.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = images.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    features = model.forward_image((images - mean) / std)["backbone_fpn"]
    features[-1] = features[-1] + model.no_mem_embed.view(1, -1, 1, 1)
    return features


def decode(model, features, coords, labels, mask_input=None):
    """All four masks of the decoder (the single one, then the three) and their scores.

    Returns: logits N x 4 x S/4 x S/4, scores N x 4; N / len(features) prompts belong to each image in turn.
    """
    repeats = len(coords) // len(features[0])
    sparse, dense = model.sam_prompt_encoder(points=(coords, labels.int()), boxes=None, masks=mask_input)
    s0, s1, embed = [level.repeat_interleave(repeats, 0) for level in features]
    logits, scores, _, _ = model.sam_mask_decoder.predict_masks(
        image_embeddings=embed,
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        repeat_image=False,
        high_res_features=[s0, s1],
    )
    return logits, scores


def disc_around(coords, size):
    """Discs of DISC_RADIUS around the clicks N x 1 x 2: masks N x size x size.

    From random weights the model first learns what an object looks like and stops listening to its
    prompt: in a run without discs (lr 1.5e-3) the masks of two clicks differed by 1e-7 after 2,000 steps.
    Asked for a disc around the click it has to listen.
    """
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (x - coords[:, :1, 0:1]) ** 2 + (y - coords[:, :1, 1:2]) ** 2 < DISC_RADIUS**2


def training_prompt(model, features, masks, rng):
    """One kind of prompt for a whole step: a click, several, a box, or a click with a rough mask."""
    kind = rng.random()
    if kind < 0.5:
        return (*click_prompt(masks, 1), None)
    if kind < 0.7:
        return (*click_prompt(masks, int(rng.integers(2, 5))), None)
    if kind < 0.9:
        return (*box_prompt(masks), None)
    coords, labels = click_prompt(masks, 1)
    with torch.no_grad():
        logits, _ = decode(model, features, coords, labels)
    return coords, labels, logits[:, 1:2].clamp(-32, 32)


def loss_of(logits, scores, masks, score_weight=1.0):
    """Mean over all masks of 4 BCE + Dice at half the image's size, plus |score - IoU|."""
    target = F.avg_pool2d(masks[:, None].float(), 2).expand(-1, logits.shape[1], -1, -1)
    logits = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    bce = F.binary_cross_entropy_with_logits(logits, target)
    prob = logits.sigmoid()
    dice = 1 - (2 * (prob * target).sum((2, 3)) + 1) / (prob.sum((2, 3)) + target.sum((2, 3)) + 1)
    with torch.no_grad():
        iou = iou_of(logits > 0, target > 0.5)
    return 4 * bce + dice.mean() + score_weight * (scores - iou).abs().mean()


def iou_of(a, b):
    """IoU over the last two axes of two bool tensors."""
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp(min=1)


@torch.inference_mode()
def evaluate(model, size, kind="click", count=40):
    """Mean IoU of the highest-scored of the three masks, on `count` held-out scenes x PROMPTS prompts."""
    model.eval()
    torch.manual_seed(HELD_OUT_SEED)
    total = 0.0
    for images, masks in DataLoader(Scenes(size, count, HELD_OUT_SEED), SCENES):
        masks = masks.flatten(0, 1)
        prompt = box_prompt(masks) if kind == "box" else click_prompt(masks, 1)
        logits, scores = decode(model, encode(model, images), *prompt)
        best = logits[torch.arange(len(masks)), 1 + scores[:, 1:].argmax(1)]
        best = F.interpolate(best[:, None], masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        total += iou_of(best > 0, masks).sum().item()
    model.train()
    return total / (count * PROMPTS)


def build(size):
    config = OmegaConf.load(HERE / "sam2_demo.yaml")
    config.model.image_size = size
    return instantiate(config.model, _recursive_=True)


def main():
    parser = argparse.ArgumentParser(description="Pre-train the demo's small SAM 2 on drawn scenes.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "sam2_demo.pt")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of steps by this")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    phases = [(size, max(1, int(steps * args.scale))) for size, steps in PHASES]
    all_steps = sum(steps for _, steps in phases)
    model, optimizer, step, started = None, None, 0, time.time()
    for size, steps in phases:
        weights = model.state_dict() if model else None
        model = build(size).train()
        if weights:
            model.load_state_dict(weights)
        state = optimizer.state_dict() if optimizer else None
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
        if state:
            optimizer.load_state_dict(state)
        # every scene is drawn once: its seed is its place in the whole run
        scenes = Scenes(size, steps * SCENES, args.seed * 10**7 + step * SCENES)
        for images, masks in DataLoader(scenes, SCENES, num_workers=1, prefetch_factor=8):
            rate = min(1, (step + 1) / WARMUP) * 0.5 * (1 + np.cos(np.pi * step / all_steps))
            for group in optimizer.param_groups:
                group["lr"] = LR * rate
            masks = masks.flatten(0, 1)
            features = encode(model, images)
            if step < DISC_STEPS:
                prompt = click_prompt(masks, 1)
                loss = loss_of(*decode(model, features, *prompt), disc_around(prompt[0], size), 0.05)
            else:
                prompt = training_prompt(model, [level.detach() for level in features], masks, rng)
                loss = loss_of(*decode(model, features, *prompt), masks)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 500 == 0 or step == all_steps:
                minutes = (time.time() - started) / 60
                print(f"{size} px  step {step}/{all_steps}  loss {loss.item():.3f}  "
                      f"held-out IoU {evaluate(model, size):.3f}  {minutes:.1f} min", flush=True)
                torch.save({"model": model.state_dict()}, args.output)
    print(f"held-out IoU on 200 scenes: click {evaluate(model, size, 'click', 200):.3f}, "
          f"box {evaluate(model, size, 'box', 200):.3f}")


if __name__ == "__main__":
    main()
