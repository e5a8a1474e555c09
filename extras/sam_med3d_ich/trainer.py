"""Training and validation: simulated clicks, losses, metrics by patient, checkpoints.

All random numbers depend only on the seed, the epoch and the number of the volume. A resumed run therefore gives the
same weights as an uninterrupted one, and 4 accumulated batches of 1 the same gradients as 1 batch of 4.

Chapters:
    settings           weights of the losses, columns of the patients' table
    training           Trainer: epochs, steps, validation, checkpoints; the scheduler
    clicks and losses  simulated clicks, the losses of masks and labels
    metrics            Dice, IoU and volume by patient
"""

import contextlib
import csv
import io
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from config import differing_settings, settings_of
from dataloader import NO_LABEL, training_loader, validation_loader
from monai.data import MetaTensor
from monai.losses import DiceLoss
from monai.transforms import ResampleToMatch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from tqdm import tqdm
from utils import (
    as_cell,
    draw_patients,
    duration,
    fail,
    load_checkpoint,
    peak_memory,
    save_checkpoint,
    save_figure,
    write_file,
)

# ---- settings ----

LABEL_WEIGHT = 1.0        # of the label loss; that of the mask loss is 1
TOKEN_WEIGHT = 5.0        # of the tokens' cross-entropy in the label loss; that of the volume's is 1
PLATEAU = {"mode": "max", "factor": 0.5, "patience": 5}  # reduce_on_plateau: halve after 6 epochs without better Dice
VALIDATION_SEED = 1       # of the validation clicks, which are the same in every epoch
PATIENT_COLUMNS = ("patient_id", "volumes", "ich", "predicted_ich", "ich_probability", "dice", "iou", "true_ml",
                   "predicted_ml", "volume_error_ml")


# ---- training ----


class Trainer:
    """Trains a SamMed3dIch on Volumes and writes its files to args.output_dir."""

    def __init__(self, model, train, val, args, device):
        self.model, self.train, self.val, self.args, self.device = model.to(device), train, val, args, device
        self.on_epoch = lambda history, draw: None  # called after each epoch; draw() returns draw_patients' figure
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=args.weight_decay)
        self.scheduler = make_scheduler(self.optimizer, args)
        mixed = args.use_mixed_precision and device.startswith("cuda")
        bfloat = mixed and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = (torch.bfloat16 if bfloat else torch.float16) if mixed else None
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.precision == torch.float16)
        self.train_loader = training_loader(train, args, pin_memory=device.startswith("cuda"))
        self.val_loader = validation_loader(val, args)
        self.epoch, self.history, self.best, self.best_epoch, self.run_id = 0, [], {"dice": -1.0}, 0, None

    def encode(self, image):
        """The encoder's features in float32. Only the encoder, which takes most of the time, uses mixed precision."""
        mixed = torch.autocast("cuda", self.precision) if self.precision else contextlib.nullcontext()
        with mixed:
            features = self.model.encode(image.to(self.device, non_blocking=self.device.startswith("cuda")))
        return features.float()

    def click_losses(self, features, mask, generators):
        """Mask loss of each volume, [B], mean over the clicks: the first in the target, the rest on its errors."""
        predicted, low_res, losses = torch.zeros_like(mask, dtype=torch.bool), None, []
        for _ in range(self.args.num_clicks):
            points, labels = next_clicks(predicted, mask > 0, generators)
            low_res = self.model.decode(features, points, labels, low_res)
            logits = upscale(low_res, mask.shape[-1])
            losses.append(mask_losses(logits, mask))
            predicted, low_res = logits.detach() > 0, low_res.detach()
        return torch.stack(losses).mean(0)

    def losses(self, batch, epoch):
        """(mask loss, label loss) of each volume in a batch, [B] each; 0 where a volume has no mask or no label."""
        features = self.encode(batch["image"])
        mask = batch["mask"].to(self.device, non_blocking=self.device.startswith("cuda"))
        _, logits = self.model.head(features)
        label_loss = label_losses(logits, mask, batch["label"].to(self.device))
        bleeding = mask.flatten(1).any(1)
        mask_loss = torch.zeros_like(label_loss)
        if bleeding.any():
            numbers = batch["number"][bleeding.cpu()].tolist()
            generators = [np.random.default_rng([self.args.seed, epoch, number, 1]) for number in numbers]
            mask_loss[bleeding] = self.click_losses(features[bleeding], mask[bleeding], generators)
        return mask_loss, label_loss

    def train_epoch(self, epoch):
        """Train for one epoch; returns the mean losses, each over the volumes that have it."""
        self.model.train()
        self.train_loader.sampler.epoch = epoch
        sums, steps = np.zeros(4), self.args.gradient_accumulation_steps
        per_step = steps * self.args.batch_size
        bar = tqdm(self.train_loader, f"에포크 {epoch}", disable=None, leave=False)
        for number, batch in enumerate(bar, 1):
            mask_loss, label_loss = self.losses(batch, epoch)
            done = (number - 1) // steps * per_step
            share = min(per_step, len(self.train) - done)  # volumes in this optimizer step; the last one has fewer
            loss = (mask_loss + LABEL_WEIGHT * label_loss).sum() / share
            check_finite("손실", loss)
            self.scaler.scale(loss).backward()
            if number % steps == 0 or number == len(self.train_loader):
                self.step()
            sums += [mask_loss.sum().item(), (mask_loss > 0).sum().item(), label_loss.sum().item(),
                     (batch["label"] >= 0).sum().item()]
        check_finite("가중치", *self.parameters)
        mask_sum, masks, label_sum, labels = sums.tolist()
        return {"mask_loss": mask_sum / max(masks, 1), "label_loss": label_sum / max(labels, 1)}

    def step(self):
        """One optimizer step with the accumulated gradients; fail() if they are not finite.

        In float16 they may overflow: the scaler then skips the step and reduces its scale.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm or math.inf)
        if not self.scaler.is_enabled():
            check_finite("기울기", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def validate(self):
        """Validate; returns (table of by_patient, pictures for draw_patients, of each patient's first haemorrhage).

        The label is predicted from a crop around the head's centre, the mask from one click in a crop around the
        target. Dice and ml are measured on the grid of the mask's file, to which the prediction is resampled.
        """
        self.model.eval()
        results, pictures = [], {}
        for item in tqdm(self.val_loader, "검증", disable=None, leave=False):
            row = self.val.rows[item["number"]]
            _, logits = self.model.head(self.encode(item["head"]))
            check_finite("검증의 예측", logits)
            results.append({"probability": logits.max().sigmoid().item()})
            if row.ich:
                generator = np.random.default_rng([VALIDATION_SEED, item["number"]])
                points, labels = next_clicks(torch.zeros_like(item["mask"]), item["mask"], [generator])
                low_res = self.model.decode(self.encode(item["image"]), points.to(self.device),
                                            labels.to(self.device))
                probability = upscale(low_res, item["image"].shape[-1]).sigmoid()[0].cpu()
                results[-1] |= measure(probability, item)
                pictures.setdefault(row.patient_id, picture_of(item, probability, points))
        table = by_patient(self.val.rows, results)
        return table, [{**entry, **pictures[entry["patient_id"]]} for entry in table if entry["ich"]]

    def fit(self):
        """Train until the last epoch or until --patience epochs have not improved Dice; returns whether it stopped
        early."""
        args, started = self.args, time.time()
        first = self.epoch
        while self.epoch < args.epochs and not self.is_out_of_patience():
            began, epoch = time.time(), self.epoch + 1
            losses = self.train_epoch(epoch)
            table, pictures = self.validate()
            scores = summarize(table)
            self.history.append({"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"], **losses, **scores,
                                 "seconds": time.time() - began})
            self.scheduler.step(*[scores["dice"]] if args.scheduler_type == "reduce_on_plateau" else [])
            self.epoch, better = epoch, scores["dice"] > self.best["dice"]
            if better:
                self.best, self.best_epoch = scores, epoch
                self.save_best(table, pictures)
            save_checkpoint(args.output_dir / "latest_model.pth", self.state())
            left = (time.time() - started) / (epoch - first) * (args.epochs - epoch)
            print(report(self.history[-1], args.epochs, better, left, peak_memory(self.device)), flush=True)
            self.on_epoch(self.history, lambda pictures=pictures: draw_patients(pictures))
        return self.epoch < args.epochs

    def is_out_of_patience(self):
        """Whether --patience epochs have passed since the best one."""
        return 0 < self.args.patience <= self.epoch - self.best_epoch

    def save_best(self, table, pictures):
        """Write best_model.pth, sam_encoder.pth, patients.csv and patients.png."""
        def weights(module):  # on the CPU, so that they open everywhere
            return {name: tensor.cpu() for name, tensor in module.state_dict().items()}

        output, sam = self.args.output_dir, self.model.sam
        shared = {"head_state_dict": weights(self.model.head), "epoch": self.epoch, "scores": self.best,
                  "settings": settings_of(self.args)}
        save_checkpoint(output / "best_model.pth", {"model_state_dict": weights(sam), **shared})
        save_checkpoint(output / "sam_encoder.pth", {"image_encoder_state_dict": weights(sam.image_encoder), **shared})
        write_patients(output / "patients.csv", table)
        save_figure(draw_patients(pictures), output / "patients.png")

    def state(self):
        """The content of latest_model.pth: everything that --resume needs."""
        return {"model_state_dict": self.model.sam.state_dict(), "head_state_dict": self.model.head.state_dict(),
                "optimizer_state_dict": self.optimizer.state_dict(),
                "scheduler_state_dict": self.scheduler.state_dict(), "scaler_state_dict": self.scaler.state_dict(),
                "epoch": self.epoch, "history": self.history, "best": self.best, "best_epoch": self.best_epoch,
                "run_id": self.run_id, "settings": settings_of(self.args)}

    def load(self):
        """Restore latest_model.pth; fail() if it was not written by this script or with other settings."""
        path = self.args.output_dir / "latest_model.pth"
        state = load_checkpoint(path)
        if not isinstance(state, dict) or self.state().keys() - state.keys():
            fail(f"이 스크립트가 쓴 latest_model.pth가 아니거나 다른 버전이 쓴 것이라 이어서 할 수 없습니다: {path}")
        differing = differing_settings(self.args, state["settings"])
        if differing:
            fail(f"{path}: 다른 설정으로 한 학습입니다. 이어서 하려면 그때와 같게 주세요: {', '.join(differing)}")
        self.model.sam.load_state_dict(state["model_state_dict"])
        self.model.head.load_state_dict(state["head_state_dict"])
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.scheduler.load_state_dict(state["scheduler_state_dict"])
        self.scaler.load_state_dict(state["scaler_state_dict"])
        self.epoch, self.history, self.run_id = state["epoch"], state["history"], state["run_id"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        if isinstance(self.scheduler, LambdaLR):  # the rate in the file is for the earlier run's --epochs
            self.optimizer.param_groups[0]["lr"] = self.args.lr * self.scheduler.lr_lambdas[0](self.epoch)


def make_scheduler(optimizer, args):
    """The learning rate scheduler, stepped once per epoch. "cosine" and "step" depend on nothing but the epoch, so that
    --resume may change --epochs."""
    if args.scheduler_type == "reduce_on_plateau":
        return ReduceLROnPlateau(optimizer, **PLATEAU)
    factor = {"cosine": lambda epoch: (1 + math.cos(math.pi * min(epoch / args.epochs, 1))) / 2,
              "step": lambda epoch: 0.1 ** (3 * epoch // args.epochs)}[args.scheduler_type]  # at 1/3 and 2/3
    return LambdaLR(optimizer, factor)


def check_finite(name, *tensors):
    """fail() if one of the tensors has a NaN or an infinity, before anything is saved."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        fail(f"{name}에 NaN이나 무한대가 있어 멈춥니다. --lr을 줄이세요. 저장된 파일은 그대로입니다")


def measure(probability, item):
    """{"overlap", "predicted", "true"} in ml, measured on the grid of the truth's file.

    probability: float [1, S, S, S] on the grid of item["affine"]; item: of ValidationSet.
    """
    truth = MetaTensor(item["truth"], affine=item["truth_affine"])
    back = ResampleToMatch(mode="bilinear", padding_mode="zeros", dtype=torch.float32)(
        MetaTensor(probability, affine=item["affine"]), truth)
    predicted, truth = back.as_tensor() > 0.5, item["truth"] > 0
    voxel = torch.linalg.det(item["truth_affine"][:3, :3]).abs().item() / 1000
    return {"overlap": (predicted & truth).sum().item() * voxel, "predicted": predicted.sum().item() * voxel,
            "true": truth.sum().item() * voxel}


def picture_of(item, probability, points):
    """The data of a volume for draw_patients: the axial slice with the click, as numpy X x Y arrays."""
    x, y, axial = points[0, 0].long().tolist()
    return {"image": item["image"][0, 0, :, :, axial].numpy().copy(),
            "truth": item["mask"][0, 0, :, :, axial].numpy().copy(),
            "prediction": probability[0, :, :, axial].numpy() > 0.5, "click": (x, y)}


def report(row, epochs, better, left, memory):
    """The line to print after an epoch."""
    return (f"에포크 {row['epoch']}/{epochs}: 손실 마스크 {row['mask_loss']:.3f}, 라벨 {row['label_loss']:.3f}, "
            f"검증 Dice {row['dice']:.3f}, 라벨 정확도 {row['label_accuracy']:.0%}, lr {row['lr']:.1e}, "
            f"{duration(row['seconds'])}, 남은 시간 {duration(left)}, 메모리 {memory:.1f} GB{' ★' if better else ''}")


# ---- clicks and losses ----


def next_clicks(predicted, truth, generators):
    """A click for each volume, at a random voxel where the prediction is wrong, or in the target if none is wrong.

    predicted, truth: bool [B, 1, S, S, S]; generators: list of B numpy.random.Generator.
    Returns points, float32 [B, 1, 3], in the order of torch.argwhere, and labels, int64 [B, 1]: 1 in the target.
    """
    points, labels = [], []
    for mask, target, rng in zip(predicted, truth, generators):
        wrong = mask[0] != target[0]
        candidates = torch.argwhere(wrong if wrong.any() else target[0])
        point = candidates[rng.integers(len(candidates))]
        points.append(point)
        labels.append(target[0][tuple(point)].long())
    return torch.stack(points)[:, None].float(), torch.stack(labels)[:, None]


def mask_losses(logits, truth):
    """Dice loss + binary cross-entropy of each volume, [B], from logits and a float mask [B, 1, S, S, S].

    Dice has squared predictions in the denominator, as in SAM-Med3D's training, and is computed for each volume
    separately.
    """
    dice = DiceLoss(sigmoid=True, squared_pred=True, reduction="none")(logits, truth)  # [B, 1, 1, 1, 1]
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return dice.flatten() + cross_entropy.flatten(1).mean(1)


def label_losses(logits, mask, label):
    """Cross-entropy of each volume's label plus that of its tokens' labels (mask in the patch or not), [B].

    logits: of the tokens, [B, N]; mask: float [B, 1, S, S, S]; label: [B], 0, 1, or NO_LABEL, for which the loss is 0.
    """
    patch = mask.shape[-1] // round(logits.shape[1] ** (1 / 3))
    truth = F.max_pool3d(mask, patch).flatten(1)
    volume = F.binary_cross_entropy_with_logits(logits.amax(1), label.float(), reduction="none")
    tokens = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    return torch.where(label == NO_LABEL, 0, volume + TOKEN_WEIGHT * tokens)


def upscale(low_res, size):
    """Logits [B, 1, L, L, L] -> [B, 1, size, size, size], trilinear."""
    return F.interpolate(low_res, (size, size, size), mode="trilinear", align_corners=False)


# ---- metrics ----


def dice_and_iou(overlap, predicted, true):
    """(Dice, IoU) from the volumes of overlap, prediction and truth in one unit; `true` must not be 0."""
    return 2 * overlap / (predicted + true), overlap / (predicted + true - overlap)


def by_patient(rows, results):
    """One dict of PATIENT_COLUMNS for each patient.

    rows: Row of each volume; results: dicts with the "probability" of a haemorrhage and, for a volume that has one,
    "overlap", "predicted" and "true" in ml. Dice and IoU are computed from the sums over a patient's scans, ml are
    means over the scans with a haemorrhage. The label of a patient is 1 if that of any scan is.
    """
    patients = {}
    for row, result in zip(rows, results):
        patients.setdefault(row.patient_id, []).append((row, result))
    table = []
    for patient_id, scans in patients.items():
        probability = max(result["probability"] for _, result in scans)
        entry = {"patient_id": patient_id, "volumes": len(scans), "ich": int(any(row.ich for row, _ in scans)),
                 "predicted_ich": int(probability > 0.5), "ich_probability": probability}
        bleeding = [result for _, result in scans if "true" in result]
        if bleeding:
            overlap, predicted, true = (sum(result[name] for result in bleeding)
                                        for name in ("overlap", "predicted", "true"))
            entry["dice"], entry["iou"] = dice_and_iou(overlap, predicted, true)
            entry |= {"true_ml": true / len(bleeding), "predicted_ml": predicted / len(bleeding),
                      "volume_error_ml": (predicted - true) / len(bleeding)}
        table.append(entry)
    return table


def summarize(table):
    """Means over patients: Dice, IoU and absolute volume error of those with a haemorrhage, and accuracy, sensitivity
    and specificity of the label. A mean over no patients is None."""
    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else None

    bleeding = [entry for entry in table if entry["ich"]]
    return {
        "dice": mean(entry["dice"] for entry in bleeding), "iou": mean(entry["iou"] for entry in bleeding),
        "volume_error_ml": mean(abs(entry["volume_error_ml"]) for entry in bleeding),
        "label_accuracy": mean(entry["predicted_ich"] == entry["ich"] for entry in table),
        "sensitivity": mean(entry["predicted_ich"] for entry in bleeding),
        "specificity": mean(1 - entry["predicted_ich"] for entry in table if not entry["ich"]),
    }


def write_patients(path, table):
    """Write patients.csv, a row per patient; the measures of a patient without a haemorrhage are empty.

    An ID that a spreadsheet would take for a formula gets an apostrophe in front of it.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, PATIENT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for entry in table:
        writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else as_cell(value)
                         for name, value in entry.items()})
    write_file(path, text.getvalue().encode("utf-8-sig"))  # with a BOM, so that Excel reads Korean names
