"""Decoder steps on the labels of a folder, taken one by one while the next image is labeled: see annotate.py.

    learner = Learner(predictor, Path("masks"), steps=10)
    learner.resume(labeled)                 # the images that have a mask masks/STEM.png
    learner.add(path, features)             # its mask was saved
    while learner.work():                   # one short piece of work: encode an image, measure, one step, write
        pass

The loss and the optimizer are those of train_sam2_proper.py --recipe improved. The prompts, the learning rate and the
number of steps were chosen with benchmarks/study_annotation.py. This module uses neither a window nor a thread.
"""

import contextlib
import functools
import hashlib
import sys
from argparse import Namespace
from collections import deque
from pathlib import Path

import numpy as np
import torch
from files import fail, write_file
from tqdm import tqdm

sys.path[1:1] = [str(Path(__file__).resolve().parent.parent)]
import train_sam2_proper as train  # noqa: E402

STEPS, LR, BATCH = 10, 1e-4, 4  # steps per labeled image
KINDS = ("point", "points", "points", "box", "none")  # of prompts, drawn with equal probability
CORRECTIONS = 8                 # upper limit for "points", higher than in a training, as annotators need more
RECENT = 10                     # number of images over which agreement and loss of IoU are averaged
LOST = 0.1                      # a model may lose this much mean IoU over RECENT images against the last good weights
WORTH_SHOWING = 0.6             # lowest mean IoU, of masks without a prompt and saved masks, for suggestions
STATE = ("learned", "queued", "iteration", "gains", "agreements")  # attributes that learned_last.pt keeps


class Learner:
    """Trains the mask decoder and the prompt encoder of a SAM2ImagePredictor on labeled images, one by one.

    folder: holds the masks, STEM.png, as data/ does; learned.pt (official form) and learned_last.pt are written to it.
    steps: per image; with 0, work() only measures. An image of an earlier session is encoded when a step needs it.
    Masks below train.MIN_FOREGROUND pixels are not learned. The last good weights are restored when the mean IoU from
    one click over RECENT images is LOST lower than theirs. `initial`: the weights before the first step.
    """

    def __init__(self, predictor, folder, steps=STEPS, lr=LR):
        settings = {**train.CONFIG, **train.IMPROVED, "lr": lr, "encoder_lr": lr, "amp": False}
        self.predictor, self.folder, self.steps, self.args = predictor, Path(folder), steps, Namespace(**settings)
        train.prepare_weights(predictor.model, self.args)
        self.trained = {name: each for name, each in predictor.model.named_parameters() if each.requires_grad}
        self.initial = self.good = self.copy()
        self.optimizer = train.make_optimizer(predictor.model, self.args)
        limits = [free // 2 for free in train.free_memory(predictor.device)]
        self.cache = train.FeatureCache(predictor, self.args, limits)  # the features of set_image()
        self.batch_loss = train.BatchLoss(predictor, self.cache, self.args)
        self.images = []  # each train.LabeledImage that steps draw from, the newest last
        self.waiting, self.unwritten, self.is_written, self.has_other_weights = deque(), False, False, False
        self.learned, self.queued, self.iteration = {}, 0, 0  # learned: {STEM: hash of its mask}; queued: steps
        self.gains, self.agreements = [], []  # IoU of the last images: beyond the last good weights; without a prompt

    def resume(self, labeled):
        """Restore what learned_last.pt holds; queue the images whose mask is new or was changed since."""
        path, initial = self.folder / "learned_last.pt", self.hash_initial
        if path.exists():
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                if saved["initial"] == initial:
                    self.load(saved["model"])
                    for group in saved["optimizer"]["param_groups"]:
                        group["fused"] = self.optimizer.defaults["fused"]  # depends on the device
                    self.optimizer.load_state_dict(saved["optimizer"])
                    vars(self).update({name: saved[name] for name in STATE}, good=saved["good"])
            except Exception as error:  # torch.load raises many error types for a damaged file
                fail(f"{path}: 읽을 수 없습니다 ({type(error).__name__}). 지우면 처음부터 다시 배웁니다")
            if saved["initial"] != initial:
                fail(f"{path}: 다른 모델로 배운 것입니다. 그 모델을 주거나, --no-learn을 쓰거나, 이 파일을 지우세요")
        images = {image.stem: image for image in labeled}
        for stem in [stem for stem in self.learned if stem in images and self.learned[stem] == self.hash_mask(stem)]:
            self.keep(images.pop(stem))
        self.waiting.extend((image, None) for image in images.values())
        self.queued *= bool(self.images)

    def hash_mask(self, stem):
        return hashlib.sha256((self.folder / f"{stem}.png").read_bytes()).hexdigest()

    @functools.cached_property
    def hash_initial(self):
        """Hash of the weights before the first step."""
        digest = hashlib.sha256()
        for name, tensor in self.predictor.model.state_dict().items():
            digest.update(self.initial.get(name, tensor).cpu().numpy().tobytes())
        return digest.hexdigest()

    def add(self, path, features=None):
        """Queue an image whose mask was saved; features: predictor._features after set_image(), or None."""
        self.waiting.appendleft((path, features))

    def finish(self):
        """Take the steps of the images that were added; those of earlier sessions may wait for the next one."""
        with tqdm(desc="배우기", disable=None, leave=False) as bar:
            while self.queued or self.unwritten or self.waiting and self.waiting[0][1]:
                self.work()
                bar.update()

    def has_work(self):
        return bool(self.queued or self.unwritten or self.waiting)

    def work(self):
        """Do one piece of work, as short as one step; returns whether there is more."""
        if self.queued:
            batch = self.draw()
            missing = [image for image in batch.images if image.path not in self.cache.kept]
            if missing and self.cache.capacity >= BATCH:
                self.encode(missing[0])
            else:
                self.step(batch)
        elif self.unwritten:
            self.write()
        elif self.waiting:
            self.start(*self.waiting.popleft())
        return self.has_work()

    def start(self, path, features):
        """Measure the model on a newly labeled image and queue the image's steps, also in learned_last.pt."""
        if self.keep(path) and self.encode(self.images[-1], features):
            self.measure(self.images[-1])
            self.learned.pop(path.stem, None)  # the newest is the last, also if its mask was changed
            self.learned[path.stem] = self.hash_mask(path.stem)
            self.queued = self.steps
            if self.steps:
                self.write_last()
            else:  # no step draws from it
                self.images.clear()
                self.cache.kept.clear()

    def keep(self, path):
        """Add an image and its mask to those that steps draw from; returns whether it can be learned."""
        pairs = [(path, self.folder / f"{path.stem}.png")]
        try:
            images = train.LabeledImages(pairs, train.MAX_SIDE, train.MIN_FOREGROUND)
        except train.ImageError as error:
            return tqdm.write(f"학습하지 않습니다: {error}", file=sys.stderr)
        if not images:
            return tqdm.write(f"{path.name}: 마스크가 {train.MIN_FOREGROUND}픽셀보다 작아 학습하지 않습니다")
        self.images += images
        return True

    def encode(self, image, features=None):
        """Keep the features of an image; if memory is full, they replace the oldest. Drop an unreadable image.

        Returns whether the image was encoded.
        """
        kept, cache = self.cache.kept, self.cache
        while len(kept) >= max(1, cache.capacity):
            del kept[next(iter(kept))]
        if features and cache.capacity:
            place = self.predictor.device if len(kept) < cache.on_device else "cpu"
            levels = features["image_embed"], *features["high_res_feats"]
            kept[image.path] = [level.to(place, cache.dtype) for level in levels]
            return True
        try:
            return bool(cache([image]))
        except train.ImageError as error:
            tqdm.write(f"학습하지 않습니다: {error}", file=sys.stderr)
            self.images.remove(image)
            self.queued *= bool(self.images)
            return False

    def draw(self):
        """The train.Batch of an iteration, determined by its number. Every second one contains the newest image."""
        rng, count = np.random.default_rng([self.args.seed, self.iteration]), len(self.images)
        indices = rng.integers(max(0, count - max(BATCH, self.cache.capacity)), count, BATCH).tolist()
        if self.iteration % 2 == 0:
            indices[0] = count - 1
        kind, rngs = KINDS[rng.integers(len(KINDS))], rng.spawn(BATCH)
        corrections = int(rng.integers(CORRECTIONS)) if kind == "points" else 0
        images = [self.images[index] for index in indices]
        gt_masks = [image.mask(None if kind == "none" else each.permutation(image.objects)[0])
                    for image, each in zip(images, rngs)]
        return train.Batch(images, kind, corrections, rngs, [torch.from_numpy(mask[None]) for mask in gt_masks])

    def step(self, batch):
        loss, _ = self.batch_loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.iteration, self.queued = self.iteration + 1, self.queued - 1
        self.unwritten = not self.queued
        if not all(each.isfinite().all() for each in self.trained.values()):
            self.go_back("손실이 유한하지 않아")

    def measure(self, image):
        """Note how well an image that was not learned yet is segmented: from one click, and without a prompt."""
        gain = self.iou(image, "point")
        with self.using(self.good):
            gain -= self.iou(image, "point")
        self.gains = [*self.gains, gain][-RECENT:]
        self.agreements = [*self.agreements, self.iou(image, "none")][-RECENT:]
        if sum(self.gains) <= -LOST * RECENT:
            self.go_back(f"첫 제안의 IoU가 {LOST:.0%}p 떨어져")
        elif len(self.gains) == RECENT and sum(self.gains) >= 0:
            self.good, self.gains = self.copy(), []

    @torch.no_grad()
    def iou(self, image, kind):
        """IoU of the mask with the highest score: of a click in the middle of each object (mean), or of kind "none"."""
        predictor = self.predictor
        if kind == "none" and len(image.objects) > 1:
            return 0.0  # one mask of all objects cannot agree with the separate objects that were saved
        gt_masks = [image.mask(number) for number in image.objects[:self.args.max_objects]]
        found = train.best_masks(predictor, [image.size] * len(gt_masks),
                                 *train.simulate_prompts(predictor, self.cache([image]), kind, gt_masks))
        if kind == "none" and train.nothing_found(predictor.model):
            found[0][:] = False
        return float(np.mean([train.calculate_iou(*pair) for pair in zip(found, gt_masks)]))

    def is_worth_showing(self):
        """Whether masks without a prompt agreed well enough with what was saved last."""
        return len(self.agreements) > 2 and np.mean(self.agreements) > WORTH_SHOWING

    def go_back(self, reason):
        """Return to the last good weights."""
        tqdm.write(f"{reason} 그 전의 가중치로 돌아갑니다. 마지막에 저장한 마스크들을 확인하세요")
        self.load(self.good)
        self.optimizer.state.clear()
        self.gains = []

    def copy(self):
        return {name: each.detach().clone() for name, each in self.trained.items()}

    def load(self, weights):
        with torch.no_grad():
            for name, each in self.trained.items():
                each.copy_(weights[name])

    @contextlib.contextmanager
    def using(self, weights):
        """Use other values of the trained weights inside a with block, also between the parts of a step.

        Nothing is copied: autograd refuses weights that were changed in place between forward and backward pass.
        """
        now = {name: each.data for name, each in self.trained.items()}
        self.has_other_weights = True
        try:
            for name, each in self.trained.items():
                each.data = weights[name]
            yield
        finally:
            for name, each in self.trained.items():
                each.data = now[name]
            self.has_other_weights = False

    def write(self):
        """Write both files: learned.pt, which all scripts can load, and learned_last.pt."""
        model = self.predictor.model
        content = {"model": train.official_weights(model), "image_size": model.image_size, "prompt": "any",
                   "knows_absence": model.knows_absence}
        write_file(self.folder / "learned.pt", lambda file: torch.save(content, file))
        self.unwritten, self.is_written = False, True
        self.write_last()

    def write_last(self):
        """Write learned_last.pt: all that resume() needs."""
        content = {"model": self.copy(), "good": self.good, "optimizer": self.optimizer.state_dict(),
                   "initial": self.hash_initial, **{name: getattr(self, name) for name in STATE}}
        write_file(self.folder / "learned_last.pt", lambda file: torch.save(content, file))
