"""extras/track_video.py.

| tests | subject |
|---|---|
| the same masks as sam2 | long clips, the official architecture, memory kept |
| output | files, overwriting, killed runs, pairs for training |
| frames | random access, rotation, durations, damaged and foreign files |
| prompts | invalid ones, gaps |
| window | prompting, correcting, keys, errors; on a virtual screen |
| demo, --auto | the drawn clip, starting without a prompt |
"""

import argparse
import csv
import json
import re
import shlex
import signal
import struct
import threading
from fractions import Fraction
from pathlib import Path

import av
import common
import cv2
import files
import matplotlib
import numpy as np
import pytest
import torch
import track_video
import tracking
import window as window_module
from conftest import ROOT, SMALL_CFG, assert_fails_in_one_line, make_visible, run, write_image
from matplotlib.backend_bases import KeyEvent, MouseEvent
from PIL import Image, PngImagePlugin
from sam2.build_sam import build_sam2_video_predictor
from test_window import RealWindow

window_module.HAS_HANGUL = False  # as here, texts in the window are English then
PROMPTS = [{"frame": 1, "object": 1, "points": [[20, 20, 1]]},
           {"frame": 1, "object": 2, "box": [40, 20, 60, 40]},
           {"frame": 3, "object": 1, "points": [[26, 22, 1], [5, 50, 0]]}]  # a correction on a later frame


def draw_clip(count=8, height=60, width=80):
    """Two discs that move over a dark noisy ground: (frames N x H x W x 3 RGB, labels N x H x W with 1 and 2)."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 60, (count, height, width, 3)).astype(np.uint8)
    labels = np.zeros((count, height, width), np.uint8)
    for number, (frame, label) in enumerate(zip(frames, labels)):
        for color, place, value in (((220, 160, 90), (18 + number, 20), 1), ((90, 200, 120), (50, 30 + number), 2)):
            cv2.circle(frame, place, 9, color, -1)
            cv2.circle(label, place, 9, value, -1)
    return frames, labels


def save_folder(folder, frames, name="{:05}.jpg"):
    for number, frame in enumerate(frames):
        write_image(folder / name.format(number), frame[..., ::-1])
    return folder


def save_video(path, frames, codec="libx264", pix_fmt="yuv420p", rotation=0, times=None, options=None,
               metadata=None, aspect=None, last=None):
    """Write frames as a video file; times: of each frame in milliseconds, if not 25 a second.

    aspect: width of a pixel / its height; last: duration of the last frame in milliseconds, with times and bf=0.
    """
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        packets = stream.encode()
        if last:
            packets[-1].duration = last
        container.mux(packets)
    return path


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

@pytest.mark.parametrize("kind", ["random weights", "the demo's model"])
def test_masks_are_those_of_sam2_on_a_clip_longer_than_the_memory(tmp_path, visible, kind):
    """Longer, both ways, than num_maskmem and the object pointers reach: old outputs have been dropped."""
    checkpoint = visible if kind == "random weights" else ROOT / "demo/sam2_demo.pt"
    frames = save_folder(tmp_path / "frames", draw_clip(44)[0])
    prompts = [{**entry, "frame": entry["frame"] + 18} for entry in PROMPTS]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    track(tmp_path, checkpoint, "--prompts", "prompts.json")
    masks = read_masks(tmp_path / "output/my_tracks/frames")
    wanted = masks_of_sam2(common.load_video_predictor(SMALL_CFG, checkpoint, "cpu"), frames, prompts)
    assert (masks == wanted).all()
    assert len(masks) == 44 and {1, 2} <= set(np.unique(wanted)) and len(np.unique(wanted.sum(axis=(1, 2)))) > 10


def test_masks_are_those_of_sam2_with_the_official_architecture(clip):
    """SAM 2.1 tiny with random weights, at 256 px for the test's time."""
    name, checkpoint = "configs/sam2.1/sam2.1_hiera_t.yaml", clip / "tiny.pt"
    torch.manual_seed(0)
    torch.save({"model": build_sam2_video_predictor(name, device="cpu").state_dict()}, checkpoint)
    make_visible(checkpoint)
    for path in sorted((clip / "frames").iterdir())[5:]:
        path.unlink()
    predictor = build_sam2_video_predictor(name, str(checkpoint), device="cpu", hydra_overrides_extra=[
        "++model.image_size=256"])
    predictor.fill_hole_area = 0  # needs the CUDA extension
    wanted = masks_of_sam2(predictor, clip / "frames")
    ours = common.load_video_predictor(name, checkpoint, "cpu", image_size=256)
    prompts = track_video.read_prompts(clip / "prompts.json")
    found = {frame: tracking.label_map(objects, logits) for frame, objects, logits, _ in tracking.track(
        ours, track_video.ImageFolder(clip / "frames"), prompts)}
    assert (np.array([found[frame] for frame in range(5)]) == wanted).all() and {1, 2} <= set(np.unique(wanted))


def test_objects_that_first_appear_on_different_frames_have_the_logits_of_sam2(tmp_path, visible):
    """With a memory that is shorter than the clip both ways; object 2 has no pointer before its prompt."""
    predictor = common.load_video_predictor(SMALL_CFG, visible, "cpu")
    predictor.num_maskmem, predictor.max_obj_ptrs_in_encoder = 3, 4
    folder = save_folder(tmp_path / "frames", draw_clip(14)[0])
    prompts = {(5, 1): ([(23, 20, 1)], None), (8, 2): ([], [40.0, 28.0, 60.0, 48.0]), (10, 1): ([(28, 20, 1)], None)}
    state = predictor.init_state(str(folder))
    tracking.add_prompts(predictor, state, prompts)
    wanted = [item for reverse in (False, True) for item in predictor.propagate_in_video(state, reverse=reverse)]
    found = list(tracking.track(predictor, track_video.ImageFolder(folder), prompts))
    assert [frame for frame, *_ in found] == [frame for frame, *_ in wanted] == [*range(5, 14), *range(5, -1, -1)]
    for (_, objects, logits, _), (_, ids, theirs) in zip(found, wanted):
        assert objects == ids == [1, 2] and torch.equal(logits, theirs[:, 0])
    assert len({logits.sum().item() for _, _, logits, _ in found}) > 10


def test_tracking_keeps_only_the_memories_that_the_next_frames_use(tmp_path, visible):
    predictor = common.load_video_predictor(SMALL_CFG, visible, "cpu")
    predictor.num_maskmem, predictor.max_obj_ptrs_in_encoder = 3, 4
    video = track_video.ImageFolder(save_folder(tmp_path / "frames", draw_clip(24)[0]))
    states, kept = [], []
    init_state = predictor.init_state
    predictor.init_state = lambda folder: states.append(init_state(folder)) or states[0]
    for _ in tracking.track(predictor, video, {(10, 1): ([(28, 20, 1)], None)}):
        kept.append(len(states[0]["output_dict_per_obj"][0]["non_cond_frame_outputs"]))
    assert len(kept) == 25 and max(kept) <= 2 * 4 + 1


# ----------------------------------------------------------------------------- output

def test_all_result_files_are_written_and_the_saved_prompts_reproduce_the_masks(clip, visible):
    done = track(clip, visible, "--prompts", "prompts.json")
    folder = clip / "output/my_tracks/frames"
    masks = read_masks(folder)
    assert masks.shape == (8, 60, 80) and not list(folder.glob("**/*.tmp"))
    first = Image.open(folder / "masks/00000.png")
    assert first.mode == "P" and first.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]  # DAVIS
    rows = list(csv.DictReader((folder / "tracks.csv").open()))
    assert [(int(row["frame"]), int(row["object"])) for row in rows] == [(n, k) for n in range(8) for k in (1, 2)]
    for row in rows:
        mask = masks[int(row["frame"])] == int(row["object"])
        assert int(row["area"]) == mask.sum() and 0 < float(row["score"]) <= 1
        if mask.any():
            ys, xs = np.nonzero(mask)
            assert [int(row[name]) for name in ("x1", "y1", "x2", "y2")] == [xs.min(), ys.min(), xs.max(), ys.max()]
        else:
            assert row["x1"] == row["y2"] == ""
    with av.open(str(folder / "overlay.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 8 and shown[0].shape == (60, 80, 3)
    assert "이전 결과" not in done.stdout and "overlay.mp4" in done.stdout
    (folder / "masks/00042.png").write_bytes((folder / "masks/00001.png").read_bytes())  # of a longer video
    done = track(clip, visible, "--prompts", folder / "prompts.json")  # read before it is written again
    assert "이전 결과를 덮어씁니다: output/my_tracks/frames (masks, overlay.mp4, prompts.json" in done.stdout
    assert (read_masks(folder) == masks).all()


@pytest.mark.parametrize("name", ["masks/00000.png", "overlay.mp4", "tracks.csv", "prompts.json"])
def test_files_that_the_script_did_not_write_are_neither_deleted_nor_overwritten(clip, name):
    write_image(clip / "mine/masks/00000.png", np.zeros((60, 80), np.uint8))
    (clip / "mine/masks/00000.png").rename(clip / "mine/own")
    (clip / "mine" / name).parent.mkdir(exist_ok=True)
    (clip / "mine/own").rename(clip / "mine" / name)
    before = (clip / "mine" / name).read_bytes()
    failed = track(clip, "missing.pt", "--point", "20,20", "-o", "mine", code=1)  # before the model is loaded
    assert_fails_in_one_line(failed, f"mine/{name}: 이 영상의 이전 결과 그대로가 아니어서")
    assert (clip / "mine" / name).read_bytes() == before


def test_results_of_another_video_of_the_same_name_and_edited_masks_are_not_overwritten(clip, visible):
    save_folder(clip / "a/frames", draw_clip()[0])
    save_folder(clip / "b/frames", [np.rot90(frame, 2) for frame in draw_clip()[0]])
    track(clip, visible, "--point", "20,20", video="a/frames")
    (clip / "a").rename(clip / "moved")
    done = track(clip, visible, "--point", "20,20", video="moved/frames")
    assert "이전 결과를 덮어씁니다" in done.stdout
    mask = clip / "output/my_tracks/frames/masks/00000.png"
    failed = track(clip, visible, "--point", "20,20", video="b/frames", code=1)
    assert_fails_in_one_line(failed, "masks/00000.png: 이 영상의 이전 결과 그대로가 아니어서")
    with Image.open(mask) as image:  # an editor that keeps the text chunks
        chunks, corrected = PngImagePlugin.PngInfo(), Image.fromarray(255 - np.array(image))
        chunks.add_text("Software", image.info["Software"])
    corrected.save(mask, pnginfo=chunks)
    failed = track(clip, visible, "--point", "20,20", video="moved/frames", code=1)
    assert_fails_in_one_line(failed, "masks/00000.png: 이 영상의 이전 결과 그대로가 아니어서")


def test_an_edited_mask_stops_a_new_run_and_other_files_in_the_folder_are_kept(clip, visible):
    track(clip, visible, "--point", "20,20", "--to-data", 4, "-o", "out")
    kept = [clip / "out" / name for name in ("masks/truth_00001.png", "notes.tmp", "to_data/masks/frames_00000.png")]
    for path in kept:
        path.write_bytes(b"by hand")
    done = track(clip, visible, "--prompts", "out/prompts.json", "-o", "out")
    assert "주의: out/to_data: 이전에 남긴 것입니다" in done.stdout
    assert all(path.read_bytes() == b"by hand" for path in kept)
    again = "--point", "20,20", "--to-data", 3, "-o", "out"
    assert_fails_in_one_line(track(clip, visible, *again, code=1), "out/to_data/masks/frames_00000.png")
    kept[2].unlink()
    done = track(clip, visible, *again)
    assert "(masks, overlay.mp4, prompts.json, to_data, tracks.csv)" in done.stdout
    assert not list(clip.glob("out/to_data/*/frames_00004.png")) and kept[0].exists()
    write_image(clip / "out/masks/00003.png", np.zeros((60, 80), np.uint8))
    assert_fails_in_one_line(track(clip, visible, "--point", "20,20", "-o", "out", code=1), "out/masks/00003.png")
    failed = track(clip, visible, "--point", "20,20", "-o", "out", video="out/overlay.mp4", code=1)
    assert_fails_in_one_line(failed, "out/overlay.mp4: 결과를 쓸 자리에 있습니다")


def test_a_prompt_file_may_have_a_byte_order_mark_and_lie_in_the_output_folder(clip, visible):
    (clip / "prompts.json").write_text(json.dumps(PROMPTS), "utf-8-sig")
    track(clip, visible, "--prompts", "prompts.json", "-o", ".")
    assert len(json.loads((clip / "prompts.json").read_text("utf-8"))) == 3


def test_the_flags_point_and_box_prompt_object_1_on_the_given_frame(clip, visible):
    track(clip, visible, "--point", "22,20;5,50,0", "--box", "35,30,10,10", "--frame", 3, "-o", "flags")
    assert json.loads((clip / "flags/prompts.json").read_text()) == [
        {"frame": 3, "object": 1, "points": [[22, 20, 1], [5, 50, 0]], "box": [10, 10, 35, 30]}]
    assert len(read_masks(clip / "flags")) == 8


def test_to_data_writes_pairs_that_prepare_data_reads(clip, visible):
    track(clip, visible, "--prompts", "prompts.json", "--to-data", 3)
    folder = clip / "output/my_tracks/frames"
    images, pairs = sorted((folder / "to_data/images").iterdir()), sorted((folder / "to_data/masks").iterdir())
    masks = read_masks(folder)
    kept = [number for number in (0, 3, 6) if masks[number].any()]
    assert [path.name for path in images] == [path.name for path in pairs] == [f"frames_{n:05}.png" for n in kept] != []
    for number, image, pair in zip(kept, images, pairs):
        assert (files.read_image(image) == files.read_image(clip / f"frames/{number:05}.jpg")).all()
        saved = cv2.imread(str(pair), cv2.IMREAD_UNCHANGED)
        assert saved.dtype == np.uint16 and (saved == masks[number]).all()  # two objects
    done = track(clip, visible, "--point", "20,20", "--to-data", 4, "-o", "a folder")
    folder = clip / "a folder"
    saved = cv2.imread(str(folder / "to_data/masks/frames_00000.png"), cv2.IMREAD_UNCHANGED)
    assert saved.dtype == np.uint8 and set(np.unique(saved)) == {0, 255}  # one object
    count = len(list((folder / "to_data/images").iterdir()))
    assert f"학습용 쌍 {count}개 (대상이 없어 뺀 프레임 {2 - count}개)" in done.stdout
    command = done.stdout.split("python prepare_data.py ")[1].splitlines()[0]
    run("prepare_data.py", *shlex.split(command), cwd=clip)
    assert len(list((clip / "data/images").glob("*/*"))) == count > 0


def test_prompts_are_saved_before_tracking_so_that_a_failed_run_keeps_them(clip, visible):
    done = track(clip, visible, "--point", "20,20", "-o", "out", code=1, before="""
import tracking
def die(*_):
    raise MemoryError
tracking.track = die""")
    assert_fails_in_one_line(done, "메모리가 부족합니다")
    assert [path.name for path in (clip / "out").iterdir()] == ["prompts.json"]
    assert track_video.read_prompts(clip / "out/prompts.json") == {(0, 1): ([(20, 20, 1)], None)}
    failed = track(clip, "missing.pt", "--point", "30,20", "-o", "out", code=1)
    assert_fails_in_one_line(failed, "out/prompts.json", "덮어쓰지 않습니다", "--prompts out/prompts.json")
    track(clip, visible, "--point", "20,20", "-o", "out")
    assert len(read_masks(clip / "out")) == 8


def test_a_killed_run_leaves_no_partial_files_and_the_next_one_removes_temporary_files(clip, visible):
    done = track(clip, visible, "--point", "20,20", code=-signal.SIGKILL, before="""
import files
def write_and_die(path, content, write=files.write_file):
    write(path, content)
    if path.name == "00002.png":
        os.kill(os.getpid(), 9)
files.write_file = write_and_die""")
    folder = clip / "output/my_tracks/frames"
    assert read_masks(folder).shape == (3, 60, 80) and json.loads((folder / "prompts.json").read_text())
    assert not (folder / "overlay.mp4").exists() and not (folder / "tracks.csv").exists()
    track(clip, visible, "--point", "20,20", code=-signal.SIGKILL, before="""
import window
def draw_and_die(image, labels, drawn=[]):
    drawn.append(image)
    return image if len(drawn) < 3 else os.kill(os.getpid(), 9)
window.overlay_labels = draw_and_die""")
    assert (folder / "tracks.csv").exists() and not (folder / "overlay.mp4").exists()
    (folder / "overlay.mp4.1.tmp").touch()  # where the encoder had begun to write
    done = track(clip, visible, "--point", "20,20")
    assert "이전 결과" in done.stdout and not list(folder.glob("*.tmp")) and (folder / "overlay.mp4").exists()


# ----------------------------------------------------------------------------- frames

def numbered_frames(count=40, height=48, width=64):
    """Frames whose brightness encodes their number, even after lossy compression."""
    return np.repeat(np.arange(count, dtype=np.uint8)[:, None, None, None] * 6 + 5, 3, axis=3) * np.ones(
        (1, height, width, 1), np.uint8)


@pytest.mark.parametrize("name, codec, pix_fmt, options", [
    ("a.mp4", "libx264", "yuv420p", {"g": "12", "bf": "3"}), ("a.mkv", "libx264", "yuv420p", {"g": "300"}),
    ("a.ts", "libx264", "yuv420p", {"g": "12"}), ("a.avi", "mpeg4", "yuv420p", {}), ("a.mov", "mjpeg", "yuvj420p", {}),
    ("a.mpg", "mpeg2video", "yuv420p", {}), ("a.h264", "libx264", "yuv420p", {"g": "12"})])
def test_any_frame_of_a_video_file_can_be_read_in_any_order(tmp_path, name, codec, pix_fmt, options):
    path = save_video(tmp_path / name, numbered_frames(), codec, pix_fmt, options=options)
    with av.open(str(path)) as container:
        wanted = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = track_video.VideoFile(path)
    assert len(video) == len(wanted) == 40 and video.size == (48, 64)
    assert len({image.tobytes() for image in wanted}) > 35
    video.kept_frames, most = 4, []
    decode_from = video.decode_from
    video.decode_from = lambda start: (most.append(len(video.kept)) or item for item in decode_from(start))
    for number in (0, 1, 2, 39, 38, 37, 36, 35, 34, 20, 21, 5, 30, 31, 29, 0):
        assert (video[number] == wanted[number]).all()
    assert 0 < max(most) <= 4  # at no time more


def test_a_rotated_video_is_upright(tmp_path):
    frames = numbered_frames(3)
    frames[:, :12, :16] = 255  # a mark in the corner at the top left
    video = track_video.VideoFile(save_video(tmp_path / "turned.mp4", frames, rotation=90))  # counter-clockwise
    assert video.size == (64, 48) and video[1].shape == (64, 48, 3)
    assert video[1][-10:, :8].min() > 200 and video[1][:10, -8:].max() < 60


def test_the_overlay_keeps_the_times_of_a_variable_frame_rate(tmp_path, visible):
    times = [0, 20, 100, 140, 400, 410]
    save_video(tmp_path / "vfr.mp4", draw_clip(6)[0], times=times)
    track(tmp_path, visible, "--point", "20,20", video="vfr.mp4")
    with av.open(str(tmp_path / "output/my_tracks/vfr/overlay.mp4")) as container:
        shown = [round(frame.time * 1000) for frame in container.decode(video=0)]
    assert shown == times


def test_the_overlay_keeps_the_pixel_aspect_and_the_duration_of_the_last_frame(tmp_path):
    frames, args = draw_clip(3)[0], argparse.Namespace(output=tmp_path, name="clip", to_data=None)
    write_image(tmp_path / "masks/00000.png", np.zeros((60, 80), np.uint8))
    for number in (1, 2):
        (tmp_path / f"masks/{number:05}.png").write_bytes((tmp_path / "masks/00000.png").read_bytes())
    wide = save_video(tmp_path / "wide.mp4", frames, times=[40, 60, 200], last=3000, options={"bf": "0"},
                      aspect=Fraction(16, 15))
    list(track_video.save_pictures(track_video.VideoFile(wide), args, False))
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        shown = [(frame.time, float(frame.duration * frame.time_base)) for frame in container.decode(stream)]
        assert stream.sample_aspect_ratio == Fraction(16, 15) and stream.duration * stream.time_base == Fraction(79, 25)
    assert shown == [(0, pytest.approx(0.02)), (pytest.approx(0.02), pytest.approx(0.14)), (pytest.approx(0.16), 3)]
    turned = track_video.VideoFile(save_video(tmp_path / "turned.mp4", frames, rotation=90, aspect=Fraction(4, 3)))
    assert turned.size == (80, 60) and turned.pixel_aspect == Fraction(3, 4)
    plain = track_video.VideoFile(save_video(tmp_path / "plain.avi", frames, "mpeg4"))  # AVI stores no durations
    assert (plain.end - plain.times[-1]) * plain.time_base == Fraction(1, 25) and plain.pixel_aspect == 1


def test_the_overlay_has_even_sides_and_is_reduced_to_1280_pixels(tmp_path):
    assert track_video.overlay_frame(np.zeros((5, 7, 3), np.uint8), np.ones((5, 7), np.uint8)).shape == (6, 8, 3)
    large = track_video.overlay_frame(np.zeros((1001, 2001, 3), np.uint8), np.ones((1001, 2001), np.uint8))
    assert large.shape == (640, 1280, 3)


def test_a_truncated_video_is_used_up_to_its_last_readable_frame(tmp_path, visible):
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3)).astype(np.uint8)
    path = save_video(tmp_path / "cut.mp4", noise, options={"g": "5", "bf": "0"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "cut.mkv"), "w") as container:
        assert source.streams.video[0].frames == 30
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    for name in ("cut.avi", "cut.mkv"):
        path = tmp_path / name
        if name == "cut.avi":
            save_video(path, noise, "mpeg4", options={"g": "5"})
        content = path.read_bytes()
        path.write_bytes(content[:len(content) * 6 // 10])
        video = track_video.VideoFile(path)
        assert 10 < len(video) < 22 and video[len(video) - 1].shape == (48, 64, 3)
    done = track(tmp_path, visible, "--point", "20,20", video="cut.avi")
    assert re.search(r"주의: cut.avi: 중간에서 끝나거나 손상되었습니다. 읽을 수 있는 \d+프레임만 씁니다", done.stdout)


def test_random_access_in_a_damaged_video_gives_the_frames_of_sequential_reading(tmp_path):
    path = save_video(tmp_path / "cut.avi", numbered_frames(), "mpeg4", options={"g": "5"})
    content = bytearray(path.read_bytes())
    places = [found.start() for found in re.finditer(b"00dc", content)]
    content[places[12]:places[14]] = bytes(places[14] - places[12])  # two frames, which the index still lists
    path.write_bytes(content)
    with av.open(str(path)) as container:
        wanted = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = track_video.VideoFile(path)
    video.kept_frames = 4
    assert len(video) == len(wanted) == 38
    for number in (37, 20, 30, 6, 13):
        assert (video[number] == wanted[number]).all()


@pytest.mark.parametrize("first, shown", [(0, 25), (10, 30), (10, 20)])
def test_a_clip_trimmed_by_an_edit_list_has_exactly_the_shown_frames(tmp_path, capsys, first, shown):
    """An MP4's edit list (elst) holds the length in milliseconds and the time at which it begins, 512 a frame."""
    path = save_video(tmp_path / "trimmed.mp4", numbered_frames(), options={"g": "12", "bf": "3"})
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12
    _, begin = struct.unpack(">Ii", content[place:place + 8])
    content[place:place + 8] = struct.pack(">Ii", shown * 40, begin + first * 512)
    path.write_bytes(content)
    video = track_video.VideoFile(path)
    assert len(video) == shown and "주의" not in capsys.readouterr().out
    seen = [round((video[number].mean() - 5) / 6) for number in (0, shown - 1, 1)]
    assert seen == [first, first + shown - 1, first + 1]


def test_metadata_may_be_in_any_encoding(tmp_path):
    path = save_video(tmp_path / "named.mkv", numbered_frames(3), metadata={"title": "Titel"})
    path.write_bytes(path.read_bytes().replace(b"Titel", "Tïtel".encode("latin-1")))
    assert len(track_video.VideoFile(path)) == 3


def test_files_that_are_no_video_are_named(tmp_path, monkeypatch):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    whole = save_video(tmp_path / "whole.mp4", numbered_frames(3)).read_bytes()
    (tmp_path / "headless.mp4").write_bytes(whole[:200])
    for name in ("text.mp4", "empty.mp4", "sound.mp4", "headless.mp4", "missing.mp4"):
        with pytest.raises(files.ImageError, match=name):
            track_video.open_video(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b.mp4").write_bytes(whole)  # not a protocol "a"
    assert len(track_video.open_video("a:b.mp4")) == 3
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nwhole.mp4\n#EXT-X-ENDLIST\n")
    write_image(tmp_path / "one.jpg", numbered_frames(1)[0])
    for name in ("list.mp4", "list.m3u8", "one.jpg"):
        with pytest.raises(files.ImageError, match=f"{name}: 영상 파일.*이 아닙니다"):
            track_video.open_video(tmp_path / name)
    with pytest.raises(files.ImageError, match="No such file"):
        track_video.open_video("concat:whole.mp4|whole.mp4")
    one, other = (save_video(tmp_path / f"{width}.h264", numbered_frames(5, width=width)) for width in (64, 96))
    (tmp_path / "changes.h264").write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(files.ImageError, match=r"changes.h264: 5번 프레임부터 .*가로 64.*가로 96"):
        track_video.open_video(tmp_path / "changes.h264")


def test_frames_of_a_folder_are_in_natural_order_and_unusable_ones_are_named(tmp_path):
    frames = numbered_frames(12)
    save_folder(tmp_path, frames, "frame {}.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._frame 1.png").write_text("no image")  # written by macOS on other file systems
    (tmp_path / "folder.png").mkdir()
    video = track_video.open_video(tmp_path)
    assert [round((video[number].mean() - 5) / 6) for number in range(12)] == list(range(12))
    write_image(tmp_path / "frame 12.png", frames[0][:, :50])
    with pytest.raises(files.ImageError, match="frame 12.png: 크기가 가로 50"):
        track_video.open_video(tmp_path)
    (tmp_path / "frame 12.png").write_text("no image")
    with pytest.raises(files.ImageError, match="frame 12.png: 이미지 파일이 아니거나"):
        track_video.open_video(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(files.ImageError, match="empty: 폴더에 이미지가 없습니다"):
        track_video.open_video(tmp_path / "empty")


def test_file_names_with_full_width_digits_are_sorted():
    names = ["b10.png", "b2.png", "１2.png", "２_1.png"]  # full-width 1 and 2: letters here, but decimal to Python
    assert sorted(map(Path, names), key=track_video.natural_order) == [Path(names[place]) for place in (1, 0, 2, 3)]


def test_frames_with_exif_rotation_are_upright(tmp_path):
    image, exif = Image.fromarray(numbered_frames(1)[0]), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "1.tif", exif=exif)
    assert track_video.image_size(tmp_path / "1.tif") == files.read_image(tmp_path / "1.tif").shape[:2] == (64, 48)
    (tmp_path / "1.tif").unlink()
    image.save(tmp_path / "1.jpg", exif=exif)
    video = track_video.open_video(tmp_path)
    assert video.size == video[0].shape[:2] == (64, 48)


# ----------------------------------------------------------------------------- prompts that cannot be used

@pytest.mark.parametrize("content, words", [
    ("{", "JSON"), ("[]", "프롬프트가 없습니다"), ('[{"frame": 0}]', "1번째"), ("[3]", "1번째"), ("7", "1번째"),
    ('[{"frame": 0, "object": 1}]', "1번째"), ('[{"frame": 0, "object": 1, "points": [[1, 2]]}]', "1번째"),
    ('[{"frame": 0, "object": 1, "points": [[NaN, 2, 1]]}]', "1번째"),
    ('[{"frame": 0.5, "object": 1, "points": [[1, 2, 1]]}]', "1번째"),
    ('[{"frame": 0, "object": 1, "box": [1, 2, 3]}]', "1번째"),
    ('[{"frame": 0, "object": 1, "points": [["x", 2, 1]]}]', "1번째"),
    ('[{"frame": 0, "object": 1, "points": [[1, 2, 2]]}]', "라벨"),
    ('[{"frame": 0, "object": 0, "points": [[1, 2, 1]]}]', "대상 번호 0"),
    ('[{"frame": 0, "object": 256, "points": [[1, 2, 1]]}]', "대상 번호 256"),
    ('[{"frame": 8, "object": 1, "points": [[1, 2, 1]]}]', "0부터 7까지"),
    ('[{"frame": -1, "object": 1, "points": [[1, 2, 1]]}]', "0부터 7까지"),
    ('[{"frame": 0, "object": 1, "points": [[80, 2, 1]]}]', "(80, 2)"),
    ('[{"frame": 0, "object": 1, "box": [10, 10, 10, 20]}]', "상자"),
    ('[{"frame": 0, "object": 1, "box": [1, 1, 2, 2]}, {"frame": 0, "object": 1, "box": [1, 1, 3, 3]}]', "두 번")])
def test_prompts_that_cannot_be_used_are_named(clip, content, words):
    (clip / "bad.json").write_text(content)
    with pytest.raises(files.ImageError) as failure:
        prompts = track_video.read_prompts(clip / "bad.json")
        tracking.check_frame_prompts(prompts, track_video.ImageFolder(clip / "frames"), "bad.json", "프레임")
    assert "bad.json" in str(failure.value) and words in str(failure.value)


def test_invalid_input_fails_in_one_line_before_the_model_is_loaded(clip):
    assert_fails_in_one_line(track(clip, "missing.pt", "--point", "80,10", code=1), "(80, 10)", "가로 80", "세로 60")
    assert_fails_in_one_line(track(clip, "missing.pt", "--point", "8,10", "--frame", 8, code=1), "0부터 7까지")
    assert_fails_in_one_line(track(clip, "missing.pt", "--prompts", "none.json", code=1), "none.json")
    assert_fails_in_one_line(track(clip, "missing.pt", "--point", "8,1", video="none.mp4", code=1), "none.mp4")
    assert_fails_in_one_line(track(clip, "missing.pt", "--point", "8,10", code=1), "missing.pt")
    assert_fails_in_one_line(track(clip, "missing.pt", code=1, env={"DISPLAY": None, "MPLBACKEND": None}), "--prompts")
    for wrong in (("--point", "1"), ("--box", "1,2,3"), ("--box", "1,2,3,4;5,6,7,8"), ("--point", "1,nan"),
                  ("--prompts", "prompts.json", "--point", "1,2"), ("--point", "1,2", "--to-data", 0),
                  ("--point", "1,2,0.9"), ("--frame", 0), ("--prompts", "prompts.json", "--frame", 3)):
        assert "usage" in track(clip, "missing.pt", *wrong, code=2).stderr


@pytest.mark.parametrize("max_gap, frames", [(0, [*range(5, 12), *range(5, -1, -1)]),
                                             (2, [5, 6, 7, 8, 9, 10, 5, 4, 3, 2])])
def test_max_gap_ends_tracking_only_outside_the_prompted_frames(monkeypatch, max_gap, frames):
    """The object is visible on frames 4, 5, 6 and 8 of 12; frames 5 and 7 have prompts."""
    class Predictor:
        num_maskmem, memory_temporal_stride_for_eval, max_obj_ptrs_in_encoder = 7, 1, 16

        def propagate_in_video(self, state, reverse):
            for frame in range(5, -1, -1) if reverse else range(5, 12):
                yield frame, [1], torch.full((1, 1, 2, 2), 1.0 if frame in (4, 5, 6, 8) else -1.0)

    monkeypatch.setattr(tracking, "start_state", lambda predictor, frames: {"output_dict_per_obj": {}})
    monkeypatch.setattr(tracking, "add_prompts", lambda predictor, state, prompts: None)
    prompts = {(7, 1): ([(0, 0, 1)], None), (5, 1): ([(0, 0, 1)], None)}
    found = [frame for frame, *_ in tracking.track(Predictor(), None, prompts, max_gap)]
    assert found == frames


# ----------------------------------------------------------------------------- window

class Hand:
    """Clicks, drags and presses keys in a FrameWindow, through matplotlib's own chain of events.

    After each, it does what the window's timer does on a screen, until nothing is left to do.
    """

    def __init__(self, window):
        self.window, self.canvas, self.is_settling = window, window.figure.canvas, False
        self.canvas.draw()
        self.settle()

    def settle(self):
        if not self.is_settling:  # not within a follow() that presses keys
            self.is_settling = True
            while (self.window.waiting or self.window.following) and not self.window.error:
                self.window.guarded(self.window.tick)()
            self.is_settling = False

    def mouse(self, name, place, button):
        x, y = self.window.axes.transData.transform(place)
        self.canvas.callbacks.process(name, MouseEvent(name, self.canvas, x, y, button))
        assert self.window.error is None

    def drag(self, start, end, button=1):
        self.mouse("button_press_event", start, button)
        self.mouse("motion_notify_event", end, button)
        self.mouse("button_release_event", end, button)
        self.settle()

    def click(self, place, button=1):
        self.drag(place, place, button)

    def press(self, *keys):
        for key in keys:
            self.canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", self.canvas, key))
            self.settle()
            assert self.window.error is None


@pytest.fixture
def window(clip, visible):
    matplotlib.use("Agg")
    predictor = common.load_video_predictor(SMALL_CFG, visible, "cpu")
    video = track_video.ImageFolder(clip / "frames")
    args = argparse.Namespace(output=clip / "windowed", name="frames", to_data=None, video_hash=0)
    made = tracking.FrameWindow(video, predictor, lambda prompts: track_video.track_and_save(
        predictor, video, prompts, args), "clip")
    yield made
    made.close()
    made.worker.close()


def test_the_window_prompts_tracks_corrects_and_tracks_again(window, clip, visible):
    hand = Hand(window)
    hand.click((20, 20))
    hand.press("2")
    hand.drag((40, 20), (60, 42))
    shown = window.labels()
    assert window.prompts[0, 1] == ([pytest.approx((20, 20, 1), abs=0.3)], None) and window.prompts[0, 2][0] == []
    assert window.prompts[0, 2][1] == pytest.approx([40, 20, 60, 42], abs=0.3)
    hand.press("enter")
    assert window.tracked_prompts == window.prompts and sorted(window.tracked) == list(range(8)) and window.frame == 0
    first = read_masks(clip / "windowed")
    assert shown.any() and (first[0] == shown).all()
    hand.press("right", "pagedown", "left", "1")
    assert window.frame == 6 and window.slider.val == 6
    hand.click((5, 50), button=3)  # a correction: also adds the box around the tracked mask
    points, box = window.prompts[6, 1]
    assert points == [(pytest.approx(5, abs=0.3), pytest.approx(50, abs=0.3), 0)]
    rows, columns = np.nonzero(first[6] == 1)
    assert box == ([columns.min(), rows.min(), columns.max(), rows.max()] if len(rows) else None)
    preview = window.labels()
    assert window.tracked_prompts != window.prompts
    hand.press("enter")
    again = read_masks(clip / "windowed")
    assert (again[6] == preview)[(preview != 2) & (again[6] != 2)].all() and (again != first).any()
    track(clip, visible, "--prompts", "windowed/prompts.json", "-o", "repeated")
    assert (read_masks(clip / "repeated") == again).all()


def test_the_window_saves_the_prompts_before_it_tracks(window, clip, monkeypatch):
    hand = Hand(window)
    hand.click((20, 20))
    monkeypatch.setattr(track_video, "track", lambda *_: 1 / 0)
    hand.canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", hand.canvas, "enter"))
    hand.settle()
    assert isinstance(window.error, ZeroDivisionError)
    assert track_video.read_prompts(clip / "windowed/prompts.json") == window.prompts != {}


class DrawnFrames(list):
    """Frames as track() takes them, 96 x 96: an orange disc, which a blue one elsewhere replaces; then another orange
    disc appears, which the demo's model takes for the first one."""
    size = 96, 96

    def __init__(self):
        super().__init__(np.full((96, 96, 3), 75, np.uint8) for _ in range(7))
        for number, frame in enumerate(self):
            if number < 3:
                cv2.circle(frame, (22 + number, 30), 10, (220, 130, 40), -1)
            else:
                cv2.circle(frame, (70, 70), 10, (220, 130, 40), -1)
                cv2.circle(frame, (16 + number, 24), 9, (60, 120, 220), -1)


def test_a_click_on_a_later_frame_picks_up_a_lost_object(monkeypatch):
    matplotlib.use("Agg")
    predictor, frames = common.load_video_predictor(SMALL_CFG, ROOT / "demo/sam2_demo.pt", "cpu"), DrawnFrames()
    window = tracking.FrameWindow(frames, predictor, lambda prompts: (
        (frame, tracking.label_map(objects, logits)) for frame, objects, logits, _ in tracking.track(
            predictor, frames, prompts)), "clip")
    hand = Hand(window)
    hand.drag((12, 20), (33, 41))
    hand.press("enter", "pagedown", "left", "left")
    lost = window.labels()
    assert window.frame == 4 and lost[70, 70] == 1 and lost[24, 20] == 0
    hand.click((20, 24))
    assert window.prompts[4, 1][1] is None  # without the box around the other disc
    hand.press("enter")
    for frame in (4, 5, 6):
        found = tracking.decode_labels(window.tracked[frame])
        disc = cv2.circle(np.zeros((96, 96), np.uint8), (16 + frame, 24), 9, 1, -1)
        assert files.calculate_iou(found, disc) > 0.7
    hand.press("right")
    hand.click((21, 24))  # on the object: corrects what has been tracked
    x1, y1, x2, y2 = window.prompts[5, 1][1]
    assert (x1, y1, x2, y2) == pytest.approx([12, 15, 30, 33], abs=3)
    matplotlib.pyplot.close(window.figure)


def test_the_bracket_keys_choose_objects_above_9(window):
    hand = Hand(window)
    hand.press("[")
    assert window.object == 1
    hand.press("9", "]", "]")
    hand.click((20, 20))
    hand.press("[")
    hand.click((50, 30))
    assert list(window.prompts) == [(0, 11), (0, 10)] and set(np.unique(window.labels())) <= {0, 10, 11}
    window.object = 254
    hand.press("]", "]")
    assert window.object == 255


def test_space_plays_the_video_and_stops_it(window):
    hand = Hand(window)
    hand.press(" ")
    while window.frame < 2:
        window.tick()
    assert window.encoded == 0  # frames that pass are not encoded
    hand.press(" ")
    assert not window.is_playing and window.encoded == window.frame >= 2


def test_a_frame_that_was_left_before_it_was_encoded_is_encoded_when_it_is_shown_again(window):
    hand, held = Hand(window), threading.Event()
    window.worker.add(window_module.CLICK, held.wait)
    window.go_to(1)  # asks for its encoding, which does not start yet
    window.is_playing = True  # a frame that passes is not encoded
    window.go_to(2)
    held.set()
    hand.settle()
    assert window.encoded == 0
    window.is_playing = False
    window.go_to(1)
    hand.settle()
    assert window.encoded == 1


def test_a_frame_is_shown_before_it_is_encoded_and_clicks_on_it_are_kept(window):
    hold = threading.Event()
    forward_image = window.predictor.forward_image
    window.predictor.forward_image = lambda image: hold.wait() and forward_image(image)
    window.slider.set_val(3)
    assert "encoding ..." in window.axes.get_title()
    assert window.axes.images[0].get_array().std() > 10  # the frame is visible
    hand = Hand.__new__(Hand)
    hand.window, hand.canvas, hand.is_settling = window, window.figure.canvas, True  # does not wait for the worker
    hand.click((20, 20))
    hand.press("2", "right")
    assert not window.prompts and window.frame == 3 and len(window.axes.collections) == 1  # the star is there already
    hold.set()
    hand.is_settling = False
    hand.settle()
    assert list(window.prompts) == [(3, 1)] and (window.frame, window.object) == (4, 2)


def test_the_window_can_be_used_while_the_results_are_saved(window):
    hand, seen = Hand(window), []
    hand.click((20, 20))

    def follow(prompts):
        yield 3, np.zeros((60, 80), np.uint8)
        yield None, None
        seen.append(window.axes.get_title())
        hand.press("right", "enter")  # the second does nothing
        hand.click((30, 20))
        yield None, None
        matplotlib.pyplot.close(window.figure)
        yield None, None
        seen.append("saved")

    window.follow = follow
    hand.press("enter")
    assert seen == ["frame 0 of 0 ... 7, object 1, saving ...", "saved"] and not window.is_tracking
    assert list(window.tracked_prompts) == [(0, 1)] and list(window.prompts) == [(0, 1), (1, 1)]


def test_clearing_a_tracked_frame_removes_its_masks_and_prompts(window):
    hand = Hand(window)
    hand.click((20, 20))
    hand.press("2")
    hand.click((50, 30))
    hand.press("enter")
    assert 1 in window.labels()
    hand.press("r")
    assert not window.labels().any()
    hand.press("right")
    assert not window.labels().any()  # no prompt is left that could give a mask
    hand.press("u")
    assert window.labels().any()
    hand.press("left", "r", "1")
    hand.click((60, 40))
    (points, box), = window.prompts.values()
    assert len(points) == 1 and box is None


def test_another_button_another_frame_or_another_object_does_not_end_a_drag(window):
    hand = Hand(window)
    hand.mouse("button_press_event", (20, 20), 1)
    hand.mouse("button_release_event", (30, 30), 2)
    assert not window.prompts
    hand.mouse("button_release_event", (50, 50), 1)
    assert window.prompts[0, 1][1] == pytest.approx([20, 20, 50, 50], abs=0.3)
    hand.press("u")
    for key in ("right", "2"):
        hand.mouse("button_press_event", (20, 20), 1)
        hand.press(key)
        hand.mouse("button_release_event", (50, 50), 1)
        assert not window.prompts
    hand.mouse("button_press_event", (20, 20), 3)  # a Ctrl-click on macOS
    hand.mouse("button_release_event", (20, 20), 1)
    assert window.prompts[1, 2][0][0][2] == 0


def test_a_click_outside_the_panned_frame_is_no_prompt(window):
    window.axes.set(xlim=(-40, 60), ylim=(90, -40))
    hand = Hand(window)
    hand.click((-20, -20))
    hand.click((20, -10))
    assert not window.prompts


def test_the_u_key_undoes_r_clears_and_escape_stops_tracking(window):
    hand = Hand(window)
    hand.press("enter", "u")  # nothing to track, nothing to undo
    hand.click((20, 20))
    hand.click((25, 25))
    hand.press("right")
    hand.click((30, 30))
    assert len(window.prompts) == 2
    hand.press("r")
    assert list(window.prompts) == [(0, 1)]
    hand.press("u", "u")
    points = [pytest.approx((20, 20, 1), abs=0.3), pytest.approx((25, 25, 1), abs=0.3)]
    assert window.prompts == {(0, 1): (points, None)}
    hand.press("u")
    assert window.prompts == {(0, 1): (points[:1], None)}
    follow, seen = window.follow, []

    def follow_and_stop(prompts):
        for frame, labels in follow(prompts):
            seen.append(frame)
            if frame == 2:
                hand.press("escape", "3", "enter")  # the last two do nothing while it tracks
            yield frame, labels

    window.follow = follow_and_stop
    hand.press("enter")
    assert seen == [0, 1, 2] and window.tracked_prompts is None and not window.is_tracking and window.object == 1


def test_a_ctrl_click_on_macos_is_a_background_point(window):
    hand = Hand(window)
    hand.mouse("button_press_event", (20, 20), 3)  # its backend presses button 3 and releases button 1
    hand.mouse("button_release_event", (20, 20), 1)
    assert window.prompts == {(0, 1): ([pytest.approx((20, 20, 0), abs=0.3)], None)}


@pytest.mark.parametrize("ratio, is_box", [(1, True), (2, False)])
def test_a_press_that_moves_by_up_to_six_screen_pixels_is_a_click(window, monkeypatch, ratio, is_box):
    monkeypatch.setattr(type(window.figure.canvas), "device_pixel_ratio", ratio)
    hand = Hand(window)
    (x, y), (right, down) = window.axes.transData.transform([(20, 20), (21, 21)])
    hand.drag((20, 20), (20 + 9 / (right - x), 20 - 9 / (y - down)))  # 9 pixels of the device
    points, box = window.prompts[0, 1]
    assert bool(box) == is_box and bool(points) != is_box


def test_keys_of_a_korean_keyboard_work_and_those_of_matplotlib_do_not(window):
    hand = Hand(window)
    hand.click((20, 20))
    hand.press("ㄱ")
    assert window.prompts == {}
    hand.press("ㅕ", "l", "k", "U")  # to matplotlib l and k are logarithmic axes
    assert window.prompts == {} and window.axes.get_yscale() == window.axes.get_xscale() == "linear"
    hand.press("q")
    assert not matplotlib.pyplot.fignum_exists(window.figure.number)


def test_a_failure_in_the_window_closes_it_and_is_reported(window, clip, monkeypatch):
    (clip / "frames/00001.jpg").write_bytes(b"no image any more")
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: None)
    window.slider.set_val(1)
    with pytest.raises(files.ImageError, match="00001.jpg"):
        window.show()


def test_ctrl_c_while_the_window_tracks_closes_it_and_ends_the_script(window, monkeypatch):
    hand = Hand(window)
    hand.click((20, 20))

    def follow_and_interrupt(prompts):
        yield 0, np.zeros((60, 80), np.uint8)
        raise KeyboardInterrupt

    window.follow = follow_and_interrupt
    hand.canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", hand.canvas, "enter"))
    hand.settle()
    assert not matplotlib.pyplot.fignum_exists(window.figure.number)
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        window.show()


def test_a_click_released_while_the_window_tracks_is_ignored(window):
    hand = Hand(window)
    hand.click((20, 20))
    prompts = window.prompts

    def follow_and_release(prompts):
        yield 0, np.zeros((60, 80), np.uint8)
        hand.mouse("button_release_event", (30, 30), 1)

    window.follow = follow_and_release
    hand.mouse("button_press_event", (30, 30), 1)
    hand.press("enter")
    assert window.prompts == window.tracked_prompts == prompts and window.pressed is None


TRACKING_DRIVER = """
import sys
sys.path.insert(0, {folder!r})
import tracking

class FrameWindow(tracking.FrameWindow):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.figure.canvas.mpl_connect("draw_event", self.tell)

    def tell(self, event):
        if self.waiting:
            return
        status = "tracking" if self.is_tracking else "saving" if self.is_saving else \\
            "tracked" if self.tracked_prompts == self.prompts else "prompting"
        (left, top), (right, bottom) = self.axes.transData.transform([(0, 0), (100, 100)])
        slider = self.slider.ax.bbox
        height = self.figure.canvas.get_width_height(physical=True)[1]
        print("drawn", self.figure.canvas.manager.get_window_title(), self.frame, self.object, len(self.prompts),
              status, slider.x0, slider.x1, height - (slider.y0 + slider.y1) / 2, left, height - top, right,
              height - bottom, flush=True)

tracking.FrameWindow = FrameWindow
import {script} as script
script.run(script.main, "")
"""


class TrackingWindow(RealWindow):
    """track_video.py or segment_volume.py in a window on a virtual screen."""

    def __init__(self, folder, screen, script, *arguments):
        driver = TRACKING_DRIVER.format(folder=str(ROOT / "extras"), script=script)
        super().__init__(folder, screen, *arguments, driver=driver)

    def wait_for(self, name, frame=0, number=1, prompts=0, status="prompting"):
        """Wait until the window shows this frame, with this object selected, this many prompts and this status."""
        drawn = self.read_until(f"drawn {name} {frame} {number} {prompts} {status} ")
        *self.slider, left, top, right, bottom = (float(word) for word in drawn.split())
        self.corners = left, top, right, bottom

    def slide(self, share):
        """Click on the slider, this share of its length from the left."""
        left, right, height = self.slider
        self.xdotool("mousemove", "--window", self.id, round(left + share * (right - left)), round(height), "click", 1)


def test_real_window_prompts_two_objects_tracks_steps_corrects_and_tracks_again(clip, screen):
    with TrackingWindow(clip, screen, "track_video", "--video", "frames", "-o", "clicked") as window:
        window.wait_for_window("frames")
        geometry = window.xdotool("getwindowgeometry", "--shell", window.id)
        assert int(re.search(r"HEIGHT=(\d+)", geometry)[1]) <= 720 - 50  # the frame and a panel of the desktop
        window.click(20, 20)
        window.wait_for("frames", 0, 1, 1)
        window.xdotool("key", "bracketright")
        window.wait_for("frames", 0, 2, 1)
        window.drag((41, 20), (60, 40))
        window.wait_for("frames", 0, 2, 2)
        window.xdotool("key", "Return")
        window.wait_for("frames", 0, 2, 2, "tracked")
        first = read_masks(clip / "clicked")
        window.xdotool("key", "Right")
        window.wait_for("frames", 1, 2, 2, "tracked")
        window.slide(5 / 7)
        window.wait_for("frames", 5, 2, 2, "tracked")
        window.xdotool("key", "1")
        window.wait_for("frames", 5, 1, 2, "tracked")
        window.click(5, 50, 3)
        window.wait_for("frames", 5, 1, 3)
        window.xdotool("key", "Return")
        window.wait_for("frames", 5, 1, 3, "tracked")
        window.close()
        assert "같은 결과를 얻는 옵션: --prompts clicked/prompts.json" in window.end()
    entries = json.loads((clip / "clicked/prompts.json").read_text())
    assert [(entry["frame"], entry["object"]) for entry in entries] == [(0, 1), (0, 2), (5, 1)]
    assert entries[0]["points"] == [[pytest.approx(20, abs=1), pytest.approx(20, abs=1), 1]]
    assert entries[1]["box"] == pytest.approx([41, 20, 60, 40], abs=1) and entries[2]["points"][0][2] == 0
    assert len(first) == 8 and {1, 2} <= set(np.unique(first[0]))
    masks = read_masks(clip / "clicked")
    track(clip, ROOT / "demo/sam2_demo.pt", "--prompts", "clicked/prompts.json", "-o", "repeated")
    assert (read_masks(clip / "repeated") == masks).all()


def test_the_benchmark_prints_memory_and_speed_of_both(tmp_path):
    done = run("benchmarks/bench_tracking.py", "--frames", 2, "--rounds", 1, "--width", 64, "--height", 48, "--device",
               "cpu", cwd=tmp_path)
    rows = dict(re.findall(r"^(sam2's own|track_video.py) +2 +(\d+) +[\d.]+$", done.stdout, re.MULTILINE))
    assert len(rows) == 2 and all(100 < int(peak) < 10000 for peak in rows.values())


# ----------------------------------------------------------------------------- demo

def numbers_in(text, flag):
    return [float(number) for number in re.search(rf'{flag} "([\d.,]+)"', text)[1].split(",")]


def test_the_demo_clip_has_a_polyp_on_every_frame_and_the_box_of_the_makefile_tracks_it(tmp_path):
    done = run("extras/demo/make_demo_clip.py", "--output", "data", cwd=tmp_path)
    masks = np.array([cv2.imread(str(path), 0) for path in sorted((tmp_path / "data/clip_masks").iterdir())])
    assert masks.shape == (60, 288, 320) and set(np.unique(masks)) == {0, 255}
    shares = (masks > 0).mean(axis=(1, 2))
    assert 0.04 < shares.min() and shares.max() < 0.25
    rows, columns = np.nonzero(masks[0])
    box = [columns.min(), rows.min(), columns.max(), rows.max()]
    assert numbers_in(done.stdout, "--box") == box
    for name in ("Makefile", "extras/GUIDE.md"):  # OpenCV's versions round differently
        shown = (ROOT / name).read_text("utf-8").split("extras/demo/data/clip.mp4 ")[1]
        assert numbers_in(shown, "--box") == pytest.approx(box, abs=2)
    assert len(track_video.VideoFile(tmp_path / "data/clip.mp4")) == 60
    command = (ROOT / "Makefile").read_text("utf-8").split("extras/demo/data/clip.mp4 ")[1].split("\n")[0]
    run("extras/track_video.py", "--model-cfg", SMALL_CFG, "--checkpoint", ROOT / "demo/sam2_demo.pt", "--original",
        "--video", "data/clip.mp4", *shlex.split(command.rstrip("\\")), "--output", "tracked", "--device", "cpu",
        cwd=tmp_path, timeout=1200)
    score = run("extras/demo/score_clip.py", "tracked", "--truth", "data/clip_masks", cwd=tmp_path).stdout
    assert float(re.search(r"평균 J ([\d.]+)", score)[1]) >= 0.6  # one box on the first frame


def test_the_score_of_a_clip_is_the_mean_iou_without_the_first_frame(tmp_path):
    for number in range(3):
        truth, tracked = np.zeros((2, 20, 30), np.uint8)
        truth[5:15, 5:15], tracked[5:15, 5 + 5 * number:15 + 5 * number] = 255, 1  # half, then nothing in common
        write_image(tmp_path / f"truth/{number:05}.png", truth)
        write_image(tmp_path / f"tracked/masks/{number:05}.png", tracked)
    score = ("extras/demo/score_clip.py", "tracked", "--truth")
    done = run(*score, "truth", cwd=tmp_path)
    assert "평균 J 0.1667 (2프레임, 가장 낮은 프레임 0.0000)" in done.stdout  # (1 / 3 + 0) / 2
    (tmp_path / "empty").mkdir()
    assert_fails_in_one_line(run(*score, "empty", code=1, cwd=tmp_path), "empty")
    assert_fails_in_one_line(run(*score, "missing", code=1, cwd=tmp_path), "missing")
    write_image(tmp_path / "tracked/masks/00002.png", np.zeros((10, 10), np.uint8))
    assert_fails_in_one_line(run(*score, "truth", code=1, cwd=tmp_path), "00002.png", "크기가 다릅니다")
    (tmp_path / "tracked/masks/00001.png").unlink()
    assert_fails_in_one_line(run(*score, "truth", code=1, cwd=tmp_path), "00001.png: 없습니다")


def test_a_mirrored_video_is_refused(tmp_path):
    content = bytearray(save_video(tmp_path / "clip.mp4", draw_clip()[0]).read_bytes())
    identity = b"".join(number.to_bytes(4, "big") for number in (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30))
    matrix = content.index(identity, content.index(b"tkhd"))
    content[matrix:matrix + 4] = (-65536).to_bytes(4, "big", signed=True)
    (tmp_path / "mirrored.mp4").write_bytes(content)
    with pytest.raises(track_video.ImageError, match="뒤집힌"):
        track_video.VideoFile(tmp_path / "mirrored.mp4")


# ----------------------------------------------------------------------------- --auto

def test_auto_starts_from_the_first_certain_frame_and_saves_a_reusable_prompt(clip, visible, monkeypatch, capsys):
    predictor = common.load_video_predictor(SMALL_CFG, visible, "cpu")
    frames = draw_clip()[0]
    finder = tracking.SAM2ImagePredictor(predictor)
    finder._bb_feat_sizes = [(predictor.image_size // stride,) * 2 for stride in (4, 8, 16)]
    scores = []
    for frame in frames:
        finder.set_image(frame)
        scores.append(float(finder.predict(np.zeros((1, 2)), np.array([-1]))[1].max()))
    second = sorted(scores)[-2]
    first_of_these = min(index for index, score in enumerate(scores) if score >= second)
    (frame, number), = tracking.find_without_prompt(predictor, frames, second)
    assert (frame, number) == (first_of_these, 1) and "--recipe strongest" in capsys.readouterr().out
    (frame, _), = tracking.find_without_prompt(predictor, frames)
    assert frame == np.argmax(scores)

    track(clip, visible, "--auto")
    found = read_masks(clip / "output/my_tracks/frames")
    entry, = json.loads((clip / "output/my_tracks/frames/prompts.json").read_text())
    mask = tracking.decode_mask(track_video.base64.b64decode(entry["mask"]))
    assert mask.shape == (60, 80) and mask.any() and entry["object"] == 1
    (clip / "again.json").write_text(json.dumps([entry]))
    track(clip, visible, "--prompts", "again.json", "--output", "again")
    assert np.array_equal(read_masks(clip / "again"), found)
    entry["mask"] = entry["mask"][:40]
    (clip / "again.json").write_text(json.dumps([entry]))
    assert_fails_in_one_line(track(clip, visible, "--prompts", "again.json", "--output", "again", code=1), "again.json")


def test_auto_fails_where_nothing_is_found(clip, visible):
    weights = torch.load(visible, weights_only=True)
    last = max(name for name in weights["model"] if re.search(r"pred_obj_score_head.*bias", name))
    weights["model"][last] -= 1000
    torch.save({**weights, "prompt": "any", "knows_absence": True}, clip / "never.pt")
    assert_fails_in_one_line(track(clip, clip / "never.pt", "--auto", code=1), "찾은 것이 없습니다")
