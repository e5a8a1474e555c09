"""Time train_sam2_proper.py's iteration against the plain loop of the reference guide.

    python benchmarks/bench_training.py

Both start from the same weights, visit the same images in the same order and alternate in one run, so that
a busy machine slows both. The plain loop encodes the image at every iteration, enlarges all three masks and
passes all weights to a plain AdamW; this project's loop caches the features and uses fused AdamW. The model
is sam2.1_hiera_s at 1024 px with random weights: right for speed, meaningless for quality. Images are drawn
if none are given. --batch-size applies to the project's loop only; the plain loop takes one image at a
time. The column "limit" is what the device alone needs: the encoder's time for an image at its best batch size,
shared by the image's visits, and a step of the decoder at batch size 16, with everything on the device already.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from hydra.utils import instantiate

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
import make_demo_data  # noqa: E402

import train_sam2_proper as project  # noqa: E402

MEMORY = [(25, "--cache-gb 0"), (25, "--cache-gb 0.05"), (25, "--cache-gb 0.1"),  # iterations and flags of a training
          (2, "--encoder lora"), (2, "--encoder lora --grad-checkpointing"),
          (2, "--encoder full"), (2, "--encoder full --grad-checkpointing")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--image-dir", type=Path, help="images to use instead of drawn ones")
    parser.add_argument("--mask-dir", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--no-amp", dest="amp", action="store_false", help="full precision in both loops, also on CUDA")
    parser.add_argument("--memory", action="store_true", help="measure peak memory of several settings instead")
    args = parser.parse_args()
    if bool(args.image_dir) != bool(args.mask_dir):
        parser.error("--image-dir and --mask-dir go together")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = save_random_weights(args.model_cfg, folder / "random.pt")
        pairs = project.find_pairs(args.image_dir, args.mask_dir)[:args.images] if args.image_dir \
            else draw_pairs(folder, args.images)
        if not args.memory:
            time_iterations(args, checkpoint, pairs)
            return
        for iterations, flags in MEMORY:
            peak = peak_memory(args, checkpoint, pairs, folder, [*flags.split(), "--iterations", str(iterations)])
            print(f"{flags}: peak memory of the process {peak:.2f} GB", flush=True)


def save_random_weights(model_cfg, path):
    """Save a checkpoint in the official form for a config of the sam2 package or a YAML file."""
    torch.manual_seed(0)
    torch.save({"model": instantiate(project.read_config(model_cfg), _recursive_=True).state_dict()}, path)
    return path


def draw_pairs(folder, count):
    """Write `count` pairs of the demo's synthetic images: [(image path, mask path)]."""
    pairs = []
    for number in range(count):
        image, mask = make_demo_data.draw_image(np.random.default_rng([0, number]))
        pairs.append((folder / "images" / f"{number:03}.jpg", folder / "masks" / f"{number:03}.png"))
        for path, picture in zip(pairs[-1], (image[..., ::-1], mask)):
            path.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(path), picture)
    return pairs


def time_iterations(args, checkpoint, pairs):
    device = project.detect_device(args.device)
    plain = project.load_predictor(args.model_cfg, checkpoint, device)
    ours = project.load_predictor(args.model_cfg, checkpoint, device)
    plain.model.sam_mask_decoder.train()
    plain.model.sam_prompt_encoder.train()
    plain_optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-5, weight_decay=4e-5)
    settings = argparse.Namespace(**{**project.CONFIG, "amp": args.amp})
    project.prepare_weights(ours.model, settings)
    our_optimizer = project.make_optimizer(ours.model, settings)
    on_cuda = torch.device(device).type == "cuda"
    half = on_cuda and args.amp and project.autocast_dtype() == torch.float16
    scaler = torch.amp.GradScaler("cuda", enabled=half)
    labeled = project.LabeledImages(pairs, project.MAX_SIDE, project.MIN_FOREGROUND)
    batch_loss = project.BatchLoss(ours, project.FeatureCache(ours, settings, (0, 0)), settings)
    rng = np.random.default_rng(0)

    # each image is visited 3.75 times on average, as in 3,000 iterations over 800 images, in random order
    visits = rng.permutation(np.resize(rng.permutation(len(pairs)), round(3.75 * len(pairs))))
    batches = np.split(visits, range(args.batch_size, len(visits), args.batch_size))
    plain_iterations(plain, plain_optimizer, scaler, pairs[:1], rng, args.amp)  # warm up: neither counts
    for batch in (batches[0], batches[-1]):  # the last one may be smaller
        project_iteration(batch_loss, our_optimizer, scaler, [labeled[index] for index in batch], rng)
    memory = [free // 2 for free in project.free_memory(device)]
    first_visits = [labeled[index] for index in dict.fromkeys(visits)]
    cache = batch_loss.cache = project.FeatureCache(ours, settings, memory, first_visits)
    rows = []
    for batch in batches:
        images = [labeled[index] for index in batch]
        seen = np.mean([image.path in cache.kept for image in images])
        rows.append((seen, len(batch),
                     timed(device, plain_iterations, plain, plain_optimizer, scaler, [pairs[i] for i in batch], rng,
                           args.amp),
                     timed(device, project_iteration, batch_loss, our_optimizer, scaler, images, rng)))
    seen, images, plain_time, our_time = np.array(rows).T
    precision = f", {project.autocast_dtype()}".replace("torch.", "") if on_cuda and args.amp else ""
    print(f"{args.model_cfg}, {ours.model.image_size} px, {device}{precision}, {torch.get_num_threads()} CPU threads, "
          f"{len(pairs)} images, {len(visits)} visits, batch size {args.batch_size}")
    least = limit(ours, our_optimizer, device, args.amp, len(visits) / len(pairs))
    print(f"{'seconds an image':28} {'plain loop':>10} {'project':>10} {'ratio':>7} {'limit':>10}")
    for name, which in (("all, first visits included", seen >= 0), ("first visits", seen == 0),
                        ("later visits", seen == 1)):
        if which.any():
            a, b = plain_time[which].sum() / images[which].sum(), our_time[which].sum() / images[which].sum()
            shown = f"{least:10.4f}" if name.startswith("all") else " " * 10
            print(f"{name:28} {a:10.4f} {b:10.4f} {a / b:6.2f}x {shown}  ({images[which].sum():.0f} visits)")
    if on_cuda:
        print(f"peak GPU memory of both together: {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB")


def limit(predictor, optimizer, device, amp, visits):
    """Seconds an image of a training in which each image is visited `visits` times and the device never waits."""
    size = predictor.model.image_size
    images = torch.rand(16, 3, size, size, device=device)
    encoding = []
    with torch.no_grad(), project.mixed_precision(device, amp):
        for count in (1, 4) if device == "cpu" else (1, 4, 16):
            project.encode_images(predictor, images[:count])  # warm up
            encoding.append(timed(device, project.encode_images, predictor, images[:count]) / count)
        features = project.encode_images(predictor, images[:1])
    features = {"image_embed": features["image_embed"].repeat(16, 1, 1, 1),
                "high_res_feats": [level.repeat(16, 1, 1, 1) for level in features["high_res_feats"]]}
    prompts = [(np.full((1, 2), size / 2, np.float32), np.ones(1))] * 16
    target = torch.rand(16, size, size, device=device).round()

    def step():
        with project.mixed_precision(device, amp):
            low_res_masks, scores = project.predict_masks(predictor, features, [(size, size)] * 16, prompts)
        logits = predictor._transforms.postprocess_masks(low_res_masks[:, :1], (size, size))
        project.training_loss(logits, scores[:, :1].float(), target)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return min(encoding) / visits + timed(device, step) / 16


def timed(device, function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started


def plain_iterations(predictor, optimizer, scaler, pairs, rng, amp):
    for pair in pairs:
        plain_iteration(predictor, optimizer, scaler, *pair, rng, amp)


def plain_iteration(predictor, optimizer, scaler, image_path, mask_path, rng, amp):
    """One iteration as the reference guide writes it."""
    device = predictor.device
    image, gt = project.read_image(image_path), project.read_mask(mask_path) > 0
    point = np.array([[rng.choice(np.argwhere(gt))[::-1]]], np.float32)
    with project.mixed_precision(device, amp):
        predictor.set_image(image)
        _, coords, labels, _ = predictor._prep_prompts(point, np.ones((1, 1)), None, None, True)
        sparse, dense = predictor.model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        low_res_masks, scores, _, _ = predictor.model.sam_mask_decoder(
            image_embeddings=predictor._features["image_embed"][-1].unsqueeze(0),
            image_pe=predictor.model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense,
            multimask_output=True, repeat_image=False,
            high_res_features=[level[-1].unsqueeze(0) for level in predictor._features["high_res_feats"]])
    masks = predictor._transforms.postprocess_masks(low_res_masks, predictor._orig_hw[-1])
    target = torch.from_numpy(gt.astype(np.float32)).to(device)
    loss, iou = project.training_loss(masks[:, :1], scores[:, :1].float(), target[None])
    predictor.model.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item(), iou.item()


def project_iteration(batch_loss, optimizer, scaler, images, rng):
    """One iteration of train_sam2_proper.py on a batch of images."""
    gt_masks = [torch.from_numpy(image.mask(image.objects[0]))[None] for image in images]
    loss, _ = batch_loss(project.Batch(images, "point", 0, [rng] * len(images), gt_masks))
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def peak_memory(args, checkpoint, pairs, folder, flags):
    """Peak resident memory, in GB, of a process that trains with these flags on the folders of `pairs`."""
    image_dir, mask_dir = (path.parent for path in pairs[0])
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_sam2_proper.py"), "--model-cfg", args.model_cfg, "--checkpoint", checkpoint,
         "--image-dir", image_dir, "--mask-dir", mask_dir, "--val-image-dir", folder / "none",
         "--output-dir", folder / "output", "--workers", "0", "--device", args.device,
         "--batch-size", str(args.batch_size), "--amp" if args.amp else "--no-amp", *flags],
        stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    main()
