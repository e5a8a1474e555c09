"""track_video.py: the same masks as sam2's own predictor, from files of every kind, and a window."""

import csv
import json
import os
import signal
from fractions import Fraction
from pathlib import Path

import av
import common
import cv2
import numpy as np
import pytest
import torch
import track_video
import tracking
from conftest import SMALL_CFG, assert_fails_in_one_line, run, write_image
from matplotlib.backend_bases import KeyEvent, MouseEvent
from PIL import Image
from sam2.build_sam import build_sam2_video_predictor

PROMPTS = [{"frame": 1, "object": 1, "points": [[20, 20, 1]]},
           {"frame": 1, "object": 2, "box": [40, 20, 60, 40]},
           {"frame": 3, "object": 1, "points": [[26, 22, 1], [5, 50, 0]]}]  # a correction on a later frame


def draw_clip(count=8, height=60, width=80):
    """Two discs that move over a dark noisy ground: (frames N x H x W x 3 RGB, labels N x H x W with 1 and 2)."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 60, (count, height, width, 3)).astype(np.uint8)
    labels = np.zeros((count, height, width), np.uint8)
    for number, (frame, label) in enumerate(zip(frames, labels)):
        for colour, place, value in (((220, 160, 90), (18 + number, 20), 1), ((90, 200, 120), (50, 30 + number), 2)):
            cv2.circle(frame, place, 9, colour, -1)
            cv2.circle(label, place, 9, value, -1)
    return frames, labels


def save_folder(folder, frames, name="{:05}.jpg"):
    for number, frame in enumerate(frames):
        write_image(folder / name.format(number), frame[..., ::-1])
    return folder


def save_video(path, frames, codec="libx264", pix_fmt="yuv420p", rotation=0, times=None, options=None):
    """Write frames as a video file; times: of each frame in milliseconds, if not 25 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_visible(checkpoint):
    """Raise the score by which the model says that an object is in sight: random weights often hide all of them."""
    weights = torch.load(checkpoint, weights_only=True)
    weights["model"]["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] += 10
    torch.save(weights, checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def visible(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("visible") / "visible.pt"
    path.write_bytes(weights.read_bytes())
    return make_visible(path)


@pytest.fixture
def clip(tmp_path):
    """A folder with a clip of 8 JPEG frames, and the prompts."""
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    save_folder(tmp_path / "frames", draw_clip()[0])
    return tmp_path


def track(folder, checkpoint, *arguments, video="frames", **how):
    return run("extras/track_video.py", "--video", video, "--model-cfg", SMALL_CFG, "--checkpoint", checkpoint,
               "--original", "--device", "cpu", *arguments, cwd=folder, **how)


def read_masks(folder):
    return np.array([np.array(Image.open(path)) for path in sorted(Path(folder).glob("masks/*.png"))])


def masks_of_sam2(predictor, folder, prompts=PROMPTS):
    """Label maps from sam2's own predictor: forwards from the first prompt, then backwards."""
    state = predictor.init_state(str(folder))
    for entry in prompts:
        points = np.array(entry.get("points", [])).reshape(-1, 3)
        predictor.add_new_points_or_box(
            state, entry["frame"], entry["object"], points=points[:, :2].astype(np.float32) if len(points) else None,
            labels=points[:, 2].astype(np.int32) if len(points) else None, box=entry.get("box"))
    found = {}
    for reverse in (False, True):
        for frame, objects, logits in predictor.propagate_in_video(state, reverse=reverse):
            logits = logits[:, 0].numpy()
            labels = np.where(logits.max(axis=0) > 0, np.array(objects)[logits.argmax(axis=0)], 0)
            found[frame] = labels.astype(np.uint8)
    return np.array([found[frame] for frame in sorted(found)])


# ----------------------------------------------------------------------------- the same masks as sam2

def test_masks_are_those_of_sam2_on_a_clip_longer_than_the_memory(tmp_path, visible):
    """60 frames: longer than num_maskmem and the object pointers reach, so that old outputs have been dropped."""
    frames = save_folder(tmp_path / "frames", draw_clip(60)[0])
    prompts = [{**entry, "frame": entry["frame"] + 24} for entry in PROMPTS]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    track(tmp_path, visible, "--prompts", "prompts.json")
    masks = read_masks(tmp_path / "output/my_tracks/frames")
    wanted = masks_of_sam2(common.load_video_predictor(SMALL_CFG, visible, "cpu"), frames, prompts)
    assert (masks == wanted).all()
    assert len(masks) == 60 and {1, 2} <= set(np.unique(wanted)) and len(np.unique(wanted.sum(axis=(1, 2)))) > 10


def test_masks_are_those_of_sam2_with_the_official_architecture(clip):
    """SAM 2.1 tiny with random weights, at 512 px for the test's time."""
    name, checkpoint = "configs/sam2.1/sam2.1_hiera_t.yaml", clip / "tiny.pt"
    torch.manual_seed(0)
    torch.save({"model": build_sam2_video_predictor(name, device="cpu").state_dict()}, checkpoint)
    make_visible(checkpoint)
    for path in sorted((clip / "frames").iterdir())[5:]:
        path.unlink()
    run("extras/track_video.py", "--video", "frames", "--prompts", "prompts.json", "--model-cfg", name, "--image-size",
        512, "--checkpoint", checkpoint, "--original", "--device", "cpu", cwd=clip)
    predictor = build_sam2_video_predictor(name, str(checkpoint), device="cpu", hydra_overrides_extra=[
        "++model.image_size=512"])
    wanted = masks_of_sam2(predictor, clip / "frames")
    assert (read_masks(clip / "output/my_tracks/frames") == wanted).all() and {1, 2} <= set(np.unique(wanted))


def test_no_more_is_kept_than_the_next_frames_need(clip, visible):
    frames, _ = draw_clip(70)
    predictor = common.load_video_predictor(SMALL_CFG, visible, "cpu")
    video = track_video.ImageFolder(save_folder(clip / "long", frames))
    kept, states = [], []
    init_state = predictor.init_state
    predictor.init_state = lambda folder: states.append(init_state(folder)) or states[0]
    for _ in tracking.track(predictor, video, {(30, 1): ([(48, 20, 1)], None)}):
        kept.append(len(states[0]["output_dict_per_obj"][0]["non_cond_frame_outputs"]))
    assert len(kept) == 71 and max(kept) <= 2 * predictor.max_obj_ptrs_in_encoder + 1
