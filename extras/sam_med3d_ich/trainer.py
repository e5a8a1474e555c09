"""Training and validation: simulated clicks, losses, metrics by patient, checkpoints.

Every draw follows from the seed, the epoch and the number of the volume, not from the batch or from what was drawn
before: a resumed run repeats an uninterrupted one, and 4 accumulated batches of 1 give what 1 batch of 4 gives.
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
from monai.transforms import ResampleToMatch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from tqdm import tqdm
from utils import (
    draw_patients,
    duration,
    fail,
    load_checkpoint,
    peak_memory,
    save_checkpoint,
    save_figure,
    write_file,
)

LABEL_WEIGHT = 1.0        # of the label's loss beside the mask's
TOKEN_WEIGHT = 5.0        # of the tokens' cross-entropy beside the volume's, within the label's loss
PLATEAU = {"mode": "max", "factor": 0.5, "patience": 5}  # reduce_on_plateau: half after 6 epochs without a better Dice
VALIDATION_SEED = 1       # of the clicks in the validation: the same ones every time
PATIENT_COLUMNS = ("patient_id", "volumes", "ich", "predicted_ich", "ich_probability", "dice", "iou", "true_ml",
                   "predicted_ml", "volume_error_ml")


# ---- clicks and losses ----

def next_clicks(predicted, truth, generators):
    """A click for each volume, at a random voxel where the prediction is wrong; in the target if it is right.

    predicted, truth: bool [B, 1, S, S, S]; generators: B of numpy's.
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

    Dice with squared predictions in the denominator, as SAM-Med3D's training has it (MONAI's DiceCELoss with
    sigmoid=True, squared_pred=True), for each volume on its own.
    """
    probability, axes = logits.sigmoid(), (1, 2, 3, 4)
    overlap = (probability * truth).sum(axes)
    size = (probability**2).sum(axes) + (truth**2).sum(axes)
    dice = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return dice + F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(axes)


def label_losses(logits, mask, label):
    """Cross-entropy of each volume's label, [B], and of its tokens', which learn where they see a haemorrhage.

    logits: of the tokens, [B, N]; mask: float [B, 1, S, S, S]; label: 0, 1, or NO_LABEL, whose loss is 0.
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
    """Dice and IoU from volumes; the true one is not 0."""
    return 2 * overlap / (predicted + true), overlap / (predicted + true - overlap)


def by_patient(rows, results):
    """One dict of PATIENT_COLUMNS for each patient.

    rows: the volumes' Rows; results: dicts of a volume's "probability" of a haemorrhage and, where it has one,
    "overlap", "predicted", "true" in ml. Dice and IoU are those of all scans of a patient taken together; ml are means
    over the scans with a haemorrhage; a patient has one if one of the scans does.
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
    """Means over the patients: Dice, IoU and absolute volume error of those with a haemorrhage, and the label's
    accuracy, sensitivity and specificity (None where there is no such patient)."""
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
    """patients.csv: a row a patient; empty where there is no haemorrhage to measure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, PATIENT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for entry in table:
        writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value
                         for name, value in entry.items()})
    write_file(path, text.getvalue().encode("utf-8-sig"))  # with a BOM, so that Excel reads Korean names


# ---- training ----

def make_scheduler(optimizer, args):
    """The learning rate by epoch. Those that are formulas need nothing but the epoch, so --epochs may change."""
    if args.scheduler_type == "reduce_on_plateau":
        return ReduceLROnPlateau(optimizer, **PLATEAU)
    factor = {"cosine": lambda epoch: (1 + math.cos(math.pi * min(epoch / args.epochs, 1))) / 2,
              "step": lambda epoch: 0.1 ** (3 * epoch // args.epochs)}[args.scheduler_type]  # twice, at the thirds
    return LambdaLR(optimizer, factor)


class Trainer:
    """Trains a SamMed3dIch on Volumes and writes its files to args.output_dir."""

    def __init__(self, model, train, val, args, device):
        self.model, self.train, self.val, self.args, self.device = model.to(device), train, val, args, device
        self.on_epoch = lambda history, draw: None  # called after each epoch; draw() gives the figure of the patients
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
        """The encoder's features in float32; only the encoder, which takes nearly all the time, runs in less."""
        mixed = torch.autocast("cuda", self.precision) if self.precision else contextlib.nullcontext()
        with mixed:
            features = self.model.encode(image.to(self.device, non_blocking=True))
        return features.float()

    def click_losses(self, features, mask, generators):
        """The mask's loss of each volume, [B], mean over the clicks: one in the target, then on what is wrong."""
        low_res = features.new_zeros(len(mask), 1, *[self.model.low_res] * 3)
        predicted, losses = torch.zeros_like(mask, dtype=torch.bool), []
        for _ in range(self.args.num_clicks):
            points, labels = next_clicks(predicted, mask > 0, generators)
            low_res = self.model.decode(features, points, labels, low_res)
            logits = upscale(low_res, mask.shape[-1])
            losses.append(mask_losses(logits, mask))
            predicted, low_res = logits.detach() > 0, low_res.detach()
        return torch.stack(losses).mean(0)

    def losses(self, batch, epoch):
        """(mask's loss, label's loss) of each volume in a batch, [B] each; 0 where there is none to learn from."""
        features = self.encode(batch["image"])
        mask = batch["mask"].to(self.device, non_blocking=True)
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
        """One pass over the training volumes; returns the mean losses, each over the volumes that have it."""
        self.model.train()
        self.train_loader.sampler.epoch = epoch
        sums, steps = np.zeros(4), self.args.gradient_accumulation_steps
        per_step = steps * self.args.batch_size
        bar = tqdm(self.train_loader, f"에포크 {epoch}", disable=None, leave=False)
        for number, batch in enumerate(bar, 1):
            mask_loss, label_loss = self.losses(batch, epoch)
            done = (number - 1) // steps * per_step
            share = min(per_step, len(self.train) - done)  # volumes in this step of the optimizer; fewer in the last
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
        """One step of the optimizer with the accumulated gradients; fail() if they are not finite.

        In float16 they may be: the scaler leaves the step out, and multiplies the next losses by less.
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
        """(table of by_patient, pictures for draw_patients: of each patient's first haemorrhage) of the validation.

        The label comes from a crop around the head's centre, the mask from one click in a crop around the target.
        Dice and ml are measured with the voxels of the mask's file, after the prediction is brought back to them.
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
                features = self.encode(item["image"])
                low_res = features.new_zeros(1, 1, *[self.model.low_res] * 3)
                low_res = self.model.decode(features, points.to(self.device), labels.to(self.device), low_res)
                probability = upscale(low_res, item["image"].shape[-1]).sigmoid()[0].cpu()
                results[-1] |= measure(probability, item)
                pictures.setdefault(row.patient_id, picture_of(item, probability, points))
        table = by_patient(self.val.rows, results)
        return table, [{**entry, **pictures[entry["patient_id"]]} for entry in table if entry["ich"]]

    def fit(self):
        """Train to the last epoch, or until --patience epochs in a row were not better; returns whether early."""
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
        return 0 < self.args.patience <= self.epoch - self.best_epoch

    def save_best(self, table, pictures):
        """best_model.pth, sam_encoder.pth, patients.csv and patients.png of the best epoch so far."""
        output, sam = self.args.output_dir, self.model.sam
        shared = {"head_state_dict": self.model.head.state_dict(), "epoch": self.epoch, "scores": self.best,
                  "settings": settings_of(self.args)}
        save_checkpoint(output / "best_model.pth", {"model_state_dict": sam.state_dict(), **shared})
        save_checkpoint(output / "sam_encoder.pth",
                        {"image_encoder_state_dict": sam.image_encoder.state_dict(), **shared})
        write_patients(output / "patients.csv", table)
        save_figure(draw_patients(pictures), output / "patients.png")

    def state(self):
        """All that --resume needs."""
        return {"model_state_dict": self.model.sam.state_dict(), "head_state_dict": self.model.head.state_dict(),
                "optimizer_state_dict": self.optimizer.state_dict(),
                "scheduler_state_dict": self.scheduler.state_dict(), "scaler_state_dict": self.scaler.state_dict(),
                "epoch": self.epoch, "history": self.history, "best": self.best, "best_epoch": self.best_epoch,
                "run_id": self.run_id, "settings": settings_of(self.args)}

    def load(self):
        """Go on from latest_model.pth; fail() if it is not one, or of a run with other settings."""
        path = self.args.output_dir / "latest_model.pth"
        state = load_checkpoint(path)
        if not isinstance(state, dict) or self.state().keys() - state.keys():
            fail(f"이 스크립트가 쓴 latest_model.pth가 아니거나 다른 버전이 쓴 것이라 이어서 할 수 없습니다: {path}")
        differing = differing_settings(self.args, state["settings"])
        if differing:
            fail(f"{path}는 다른 설정으로 한 학습입니다. 이어서 하려면 그때와 같게 주세요: {', '.join(differing)}")
        self.model.sam.load_state_dict(state["model_state_dict"])
        self.model.head.load_state_dict(state["head_state_dict"])
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.scheduler.load_state_dict(state["scheduler_state_dict"])
        self.scaler.load_state_dict(state["scaler_state_dict"])
        self.epoch, self.history, self.run_id = state["epoch"], state["history"], state["run_id"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        if isinstance(self.scheduler, LambdaLR):  # its formula may have another --epochs than the rate in the file
            self.optimizer.param_groups[0]["lr"] = self.args.lr * self.scheduler.lr_lambdas[0](self.epoch)


def check_finite(name, *tensors):
    """fail() if one of the tensors has a NaN or an infinity: a model that gives such values is not saved."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        fail(f"{name}에 NaN이나 무한대가 있어 멈춥니다. --lr을 줄이세요. 저장된 파일은 그대로입니다")


def measure(probability, item):
    """"overlap", "predicted" and "true" in ml, with the voxels of the truth's file. probability: [1, S, S, S]."""
    truth = MetaTensor(item["truth"], affine=item["truth_affine"])
    back = ResampleToMatch(mode="bilinear", padding_mode="zeros", dtype=torch.float32)(
        MetaTensor(probability, affine=item["affine"]), truth)
    predicted, truth = back.as_tensor() > 0.5, item["truth"] > 0
    voxel = torch.linalg.det(item["truth_affine"][:3, :3]).abs().item() / 1000
    return {"overlap": (predicted & truth).sum().item() * voxel, "predicted": predicted.sum().item() * voxel,
            "true": truth.sum().item() * voxel}


def picture_of(item, probability, points):
    """What draw_patients shows of a volume: the axial slice with the click."""
    x, y, axial = points[0, 0].long().tolist()
    return {"image": item["image"][0, 0, :, :, axial].numpy().copy(),
            "truth": item["mask"][0, 0, :, :, axial].numpy().copy(),
            "prediction": probability[0, :, :, axial].numpy() > 0.5, "click": (x, y)}


def report(row, epochs, better, left, memory):
    """The line that is printed after an epoch."""
    return (f"에포크 {row['epoch']}/{epochs}: 손실 {row['mask_loss']:.3f} (라벨 {row['label_loss']:.3f}), "
            f"검증 Dice {row['dice']:.3f}, 라벨 {row['label_accuracy']:.0%}, lr {row['lr']:.1e}, "
            f"{duration(row['seconds'])}, 남은 시간 {duration(left)}, 메모리 {memory:.1f} GB{' ★' if better else ''}")
