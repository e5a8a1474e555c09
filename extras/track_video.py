"""Track objects through a video with SAM 2.1: prompt some frames, get a mask for every frame.

    python extras/track_video.py --video clip.mp4 --point "320,200"
    python extras/track_video.py --video frames/ --prompts prompts.json
    python extras/track_video.py --video clip.mp4                       a window

Frames are decoded when they are needed and old memories are dropped, so a long video takes no more memory than
a short one.

Chapters:
    settings         sizes, containers, names of the results
    the run          main() and the command line
    earlier results  which files in the output folder may be replaced
    reading          folders of images, video files, prompts.json
    writing          masks, table, overlay, image and mask pairs
"""

import argparse
import base64
import io
import json
import math
import os
import re
import shlex
import zlib
from bisect import bisect
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from common import add_model_flags, choose_checkpoint, load_video_predictor
from files import (
    FORMATS,
    ImageError,
    detect_device,
    fail,
    list_images,
    read_image,
    run,
    write_csv,
    write_file,
    write_json,
)
from matplotlib import pyplot as plt
from PIL import Image, PngImagePlugin
from tqdm import tqdm
from tracking import (
    FrameWindow,
    as_label,
    check_frame_prompts,
    decode_mask,
    find_without_prompt,
    label_map,
    parse_numbers,
    sorted_box,
    track,
)
from window import add_web_flag, overlay_labels

from test_my_image import reduce_to, require_display

# ---- settings ----

AUTO_SCORE = 0.7             # predicted IoU that --auto takes for certain
FOLDER_RATE = 25             # frames per second of the overlay, for a folder of images
OVERLAY_SIDE = 1280          # pixels: the overlay of a larger video is reduced to this
CONTAINERS = ("mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h263,h264,hevc,vvc,vc1,av1,obu,ivf,flv,asf,ogg,mxf,gif,nut,"
              "wtv,dv,mjpeg,yuv4mpegpipe")  # FFmpeg's demuxers of videos; concat, hls and others open further files
KEPT_BYTES = 64 * 2**20      # of decoded frames, kept for the backward pass
RESULTS = ("overlay.mp4", "tracks.csv", "prompts.json")  # beside masks/
MARK = "track_video.py"      # see mark()
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # errors of PIL for a bad image file


# ---- the run ----


def main():
    args = parse_args()
    if args.interactive:
        require_display(args.web, '--point "x,y", --prompts, --auto 가운데 하나를 주거나')
    else:
        plt.switch_backend("Agg")
    video = open_video(args.video)
    args.video_hash = hash_of(video)
    prompts = read_prompts(args.prompts) if args.prompts else \
        {(args.frame or 0, 1): (args.point, args.box)} if args.point or args.box else {}
    check_output(args, prompts)
    check_frame_prompts(prompts, video, args.prompts or args.video, "프레임")

    checkpoint, device = choose_checkpoint(args), detect_device(args.device)
    predictor = load_video_predictor(args.model_cfg, checkpoint, device, args.image_size)
    height, width = video.size
    print(f"모델: {checkpoint}, 장치: {device}, 영상: {len(video)}프레임, 가로 {width}, 세로 {height}픽셀")

    if args.auto:
        prompts = find_without_prompt(predictor, video, AUTO_SCORE)

    def follow(prompts):
        return track_and_save(predictor, video, prompts, args)

    is_tracked = False
    if args.interactive:
        print("창에서 좌클릭은 전경, 우클릭은 배경, 끌면 상자, 숫자 키와 [ ]는 대상 번호입니다. "
              f"Enter를 누르면 프롬프트를 {args.output / 'prompts.json'}에 저장하고 추적합니다.")
        window = FrameWindow(video, predictor, follow, args.name.encode(errors="replace").decode(),
                             aspect=float(1 / video.pixel_aspect))
        window.show()
        prompts, is_tracked = window.prompts, window.tracked_prompts == window.prompts
        if not prompts:
            fail("프롬프트가 없습니다. 창에서 추적할 대상을 클릭하거나 --point \"x,y\"를 쓰세요")
        if window.is_tracking:
            fail("추적하는 중에 창을 닫아 멈췄습니다. 다시 하려면: --prompts "
                 f"{shlex.quote(str(args.output / 'prompts.json'))}")
    if not is_tracked:
        for _ in follow(prompts):
            pass
    print(f"저장: {args.output} (masks/, overlay.mp4, tracks.csv, prompts.json)")
    if args.interactive:
        print(f"같은 결과를 얻는 옵션: --prompts {shlex.quote(str(args.output / 'prompts.json'))}")


def parse_args():
    parser = argparse.ArgumentParser(description="영상에서 SAM 2.1로 대상을 추적합니다. 프롬프트가 없으면 창을 엽니다.")
    parser.add_argument("--video", "-v", required=True, metavar="PATH",
                        help="영상 파일, 또는 프레임 이미지가 든 폴더 (이름의 자연스러운 순서대로)")
    parser.add_argument("--point", "-p", type=parse_clicks, default=[],
                        help='대상 1의 점: "x,y" 또는 "x,y,라벨;x,y,라벨" (라벨 1 전경, 0 배경; 기본 1)')
    parser.add_argument("--box", type=parse_box, help='대상 1의 상자: "x1,y1,x2,y2"')
    parser.add_argument("--frame", type=int, help="--point와 --box의 프레임 번호, 0부터 (기본: 0)")
    parser.add_argument("--prompts", metavar="FILE",
                        help='JSON 프롬프트: [{"frame": 0, "object": 1, "points": [[x, y, 라벨], ...], '
                             '"box": [x1, y1, x2, y2]}, ...]')
    parser.add_argument("--auto", action="store_true", help="프롬프트 없이, 모델이 학습한 것을 찾아 그 프레임부터 추적")
    parser.add_argument("--to-data", type=int, metavar="N",
                        help="N 프레임마다 이미지와 마스크를 to_data/에 남김 (prepare_data.py로 이어서 학습에 씀)")
    add_web_flag(parser)
    add_model_flags(parser, "output/my_tracks/이름")
    args = parser.parse_args()
    if bool(args.prompts) + bool(args.point or args.box) + args.auto > 1:
        parser.error("--prompts, --auto, 그리고 --point나 --box는 함께 쓸 수 없습니다")
    if args.frame is not None and not (args.point or args.box):
        parser.error("--frame은 --point나 --box와 함께 씁니다")
    if args.to_data is not None and args.to_data < 1:
        parser.error("--to-data는 1 이상이어야 합니다")
    path = Path(args.video)
    args.name = path.resolve().name if path.is_dir() else path.stem
    if args.output == parser.get_default("output"):
        args.output = args.output.with_name(args.name)
    args.interactive = not (args.prompts or args.point or args.box or args.auto)
    if args.web is not None and not args.interactive:
        parser.error("--web은 프롬프트 없이 창을 열 때만 씁니다")
    return args


def parse_clicks(text):
    """Parse "x,y" or "x,y,label;x,y,label": a list of (x, y, label), in pixels."""
    return [(x, y, as_label(*label or [1])) for x, y, *label in parse_numbers(text, (2, 3), '"x,y" 또는 "x,y,라벨"')]


def parse_box(text):
    """Parse "x1,y1,x2,y2": a list of floats, in pixels, x1 <= x2 and y1 <= y2."""
    (x1, y1, x2, y2), *others = parse_numbers(text, (4,), '"x1,y1,x2,y2"')
    if others:
        raise argparse.ArgumentTypeError("상자는 하나여야 합니다. 대상이 여럿이면 --prompts를 쓰세요")
    return sorted_box(x1, y1, x2, y2)


# ---- earlier results ----


def check_output(args, prompts):
    """Print which results of an earlier run will be overwritten; fail if any other file would be.

    Results of an earlier run on this video are recognized by the mark() in its masks, including training masks. The
    prompts of a run that ended before its first mask may be overwritten by identical prompts.
    """
    folder = args.output
    if Path(args.video).resolve() in [(folder / name).resolve() for name in ("masks", "to_data/images", "overlay.mp4")]:
        fail(f"{args.video}: 결과를 쓸 자리에 있습니다. 다른 --output을 쓰세요")
    masks, others = earlier_results(folder, args.name, args.to_data)
    pairs = [path for path in others if path.parent == folder / "to_data" / "masks"]
    checked = tqdm([*masks, *pairs], "이전 결과 확인", leave=False, disable=None)
    foreign = next((path for path in checked if not is_marked(path, args.video_hash)), None)
    if not masks:
        foreign = foreign or next((path for path in others if not has_prompts(path, prompts)), None)
    if foreign:
        advice = f"이어서 하려면 --prompts {shlex.quote(str(foreign))}, 아니면 " * (foreign.name == "prompts.json")
        fail(f"{foreign}: 이 영상의 이전 결과 그대로가 아니어서 덮어쓰지 않습니다. {advice}다른 --output을 쓰세요")
    if masks:
        names = sorted({path.relative_to(folder).parts[0] for path in (*masks, *others)})
        print(f"이전 결과를 덮어씁니다: {folder} ({', '.join(names)})")
    if not args.to_data and (folder / "to_data").exists():
        print(f"주의: {folder / 'to_data'}: 이전에 남긴 것입니다. --to-data가 없어 그대로 둡니다")


def earlier_results(folder, name, to_data):
    """Existing files in `folder` whose names this script uses: (paths of masks, paths of other results)."""
    masks = [path for path in sorted(folder.glob("masks/*.png")) if re.fullmatch("[0-9]{5,}", path.stem)]
    pairs = [path for path in sorted(folder.glob("to_data/*/*.png"))
             if to_data and re.fullmatch(f"{re.escape(name)}_[0-9]{{5,}}", path.stem)]
    return masks, [*(path for result in RESULTS if (path := folder / result).exists()), *pairs]


def has_prompts(path, prompts):
    """Whether a file contains these prompts."""
    try:
        return path.name == "prompts.json" and read_prompts(path) == prompts
    except OSError:
        return False


def is_marked(path, video_hash):
    """Whether a mask is unchanged since this script wrote it for a video with this hash_of()."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == mark(np.asarray(image), video_hash)
    except UNREADABLE:
        return False


def mark(pixels, video_hash):
    """The text chunk "Software" of every mask written here; files without it are not overwritten. It holds MARK, a
    checksum of the pixels (editors may keep the chunk), and hash_of() the video (many are called "frames")."""
    return f"{MARK} {zlib.crc32(pixels.astype(np.uint16).tobytes()):08x} {video_hash:08x}"


def hash_of(video):
    """A hash of a video's length, first frame and middle frame, which identifies it in any folder."""
    frames = video[0].tobytes() + video[len(video) // 2].tobytes()
    return zlib.crc32(f"{len(video)} {video.size}".encode() + frames)


# ---- reading ----


def open_video(path):
    """The frames of a video file or of a folder of images, as track() takes them. Raises ImageError."""
    return ImageFolder(Path(path)) if Path(path).is_dir() else VideoFile(Path(path))


class ImageFolder:
    """The images of a folder in natural order (2.jpg before 10.jpg), read when they are indexed.

    The headers of all images are read first, so that a file that is not an image or has another size is an error
    before anything is tracked. Raises ImageError. time_base, times, end, pixel_aspect: as in VideoFile.
    """
    pixel_aspect = Fraction(1)

    def __init__(self, path):
        self.paths = sorted(list_images(path), key=natural_order)
        if not self.paths:
            raise ImageError(f"{path}: 폴더에 이미지가 없습니다 ({', '.join(FORMATS)})")
        self.size = image_size(self.paths[0])
        for file in self.paths[1:]:
            self.check_size(file, image_size(file))
        self.time_base, self.times, self.end = Fraction(1, FOLDER_RATE), range(len(self.paths)), len(self.paths)

    def check_size(self, file, size):
        """Raise ImageError unless `size`, (H, W), is that of the first frame."""
        if size != self.size:
            raise ImageError(f"{file}: 크기가 가로 {size[1]}, 세로 {size[0]}픽셀로 첫 프레임"
                             f"(가로 {self.size[1]}, 세로 {self.size[0]})과 다릅니다")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index])
        self.check_size(self.paths[index], image.shape[:2])
        return image


def natural_order(path):
    """A sort key that compares numbers in file names by their value."""
    parts = re.split("([0-9]+)", path.name.lower())  # every second part is a number
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


def image_size(path):
    """(H, W) of an image file from its header, after the rotation in its EXIF data. Raises ImageError."""
    try:
        with Image.open(path) as image:
            is_rotated = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 exchange width and height
            # new versions of Pillow have already exchanged those of a TIFF; its tags 256 and 257 are width and height
            width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
            return (width, height) if is_rotated else (height, width)
    except UNREADABLE:
        raise ImageError(f"{path}: 이미지 파일이 아니거나 손상되었습니다") from None


class VideoFile:
    """The frames of a video file, upright, decoded when they are indexed.

    A first pass decodes the whole file and keeps only the time of each frame, so that the number of frames is exact
    and damage is found before anything is tracked. Raises ImageError if there are no frames or if their size changes.
    If the file is truncated or damaged, the frames before the damage are used and a warning is printed.

    times: presentation time of each frame; end: that of the end of the last one, both in units of time_base seconds.
    pixel_aspect: width of a pixel / its height, upright.
    """

    def __init__(self, path):
        self.path, self.times, self.keys, self.size, self.corrupt = path, [], [], None, 0
        is_whole = self.read_through()
        if not self.times:
            raise ImageError(f"{path}: 읽을 수 있는 프레임이 없습니다")
        if not is_whole:
            print(f"주의: {path}: 중간에서 끝나거나 손상되었습니다. 읽을 수 있는 {len(self.times)}프레임만 씁니다")
        if self.corrupt:
            print(f"주의: {path}: 손상된 프레임 {self.corrupt}개는 그림이 틀릴 수 있습니다")
        has_times = None not in self.times and all(map(int.__lt__, self.times, self.times[1:]))
        if not has_times:
            self.times, self.time_base = range(len(self.times)), 1 / (self.rate or Fraction(FOLDER_RATE))
            self.end = len(self.times)
        elif self.end == self.times[-1]:  # some containers, such as AVI, do not store how long a frame lasts
            self.end += round(1 / (self.rate or FOLDER_RATE) / self.time_base)
        if not (has_times and is_whole):  # no times to seek by, or an index that may be wrong
            self.keys = []
        self.numbers = {time: number for number, time in enumerate(self.times)}
        height, width = self.size
        self.kept_frames = max(2, min(64, KEPT_BYTES // (height * width * 3 // 2)))
        # {number: decoded frame}; iterator over the frames that follow them; number of the first of these
        self.kept, self.decoding, self.next = {}, iter(()), math.inf

    def open(self):
        """Open the file; returns the container and its first video stream. Raises ImageError."""
        try:
            container = av.open(f"file:{self.path}", metadata_errors="replace", options={
                "format_whitelist": CONTAINERS, "protocol_whitelist": "file"})
        except av.ArgumentError:
            raise ImageError(f"{self.path}: 영상 파일(mp4, mov, mkv, webm, avi, mpg, ts, wmv, ...)이 아닙니다. "
                             "다른 파일의 목록(m3u8, ffconcat)이나 이미지는 열지 않습니다") from None
        except av.FFmpegError as error:
            raise ImageError(f"{self.path}: 영상을 열 수 없습니다 ({error.strerror})") from None
        streams = [stream for stream in container.streams.video
                   if not stream.disposition & av.stream.Disposition.attached_pic]  # an album's cover
        if not streams:
            raise ImageError(f"{self.path}: 영상이 들어 있지 않습니다")
        stream = streams[0]
        stream.thread_type = "AUTO"
        return container, stream

    def read_through(self):
        """Decode every frame once to find times, key frames and size. Returns whether the file is complete."""
        container, stream = self.open()
        packets = 0
        with container, tqdm(desc="영상 확인", unit="프레임", leave=False, disable=None) as bar:
            self.time_base, self.rate = stream.time_base, stream.average_rate
            try:
                for packet in container.demux(stream):
                    packets += packet.size > 0
                    for frame in packet.decode():
                        if is_mirrored(frame):
                            raise ImageError(f"{self.path}: 좌우나 상하가 뒤집힌 영상(display matrix)은 읽지 않습니다. "
                                             "ffmpeg로 다시 인코딩하세요")
                        self.corrupt += frame.is_corrupt
                        size = upright_size(frame)
                        if self.size not in (None, size):
                            raise ImageError(f"{self.path}: {len(self.times)}번 프레임부터 크기가 다릅니다. 가로 "
                                             f"{self.size[1]}, 세로 {self.size[0]} → 가로 {size[1]}, 세로 {size[0]}")
                        self.size = size
                        if frame.key_frame:
                            self.keys.append(len(self.times))
                        self.times.append(frame.pts)
                        self.end = (frame.pts or 0) + (frame.duration or 0)
                        aspect = stream.sample_aspect_ratio or Fraction(1)
                        self.pixel_aspect = 1 / aspect if is_on_its_side(frame) else aspect
                        bar.update()
            except av.FFmpegError:
                return False
            # an MP4 or MOV trimmed by its edit list has more packets than frames to show, but its full duration
            is_trimmed = "mp4" in container.format.name and \
                self.end >= (stream.start_time or 0) + (stream.duration or math.inf)
            return packets >= stream.frames or is_trimmed  # stream.frames is 0 if the container lacks it

    def __len__(self):
        return len(self.times)

    def __getitem__(self, index):
        if index not in self.kept:
            place = bisect(self.keys, index)
            key = self.keys[place - 1] if place else 0
            if index < self.next or key > self.next:
                self.kept, self.decoding = {}, self.decode_from(key)
            self.decode_until(index)
            if index not in self.kept and key > 0:  # in some containers seeking goes to a later frame
                self.kept, self.decoding = {}, self.decode_from(0)
                self.decode_until(index)
            if index not in self.kept:
                raise ImageError(f"{self.path}: {index}번 프레임을 다시 읽을 수 없습니다")
        frame = self.kept[index]
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))

    def decode_until(self, index):
        """Decode up to frame `index`; keep it and the frames just before it, which a backward pass reads next."""
        for number, frame in self.decoding:
            if len(self.kept) == self.kept_frames:
                del self.kept[min(self.kept)]
            self.kept[number] = frame
            self.next = number + 1
            if number >= index:
                break

    def decode_from(self, start):
        """Yield (number, frame) from the key frame `start`, or from the beginning (0)."""
        container, stream = self.open()
        with container:
            if start > 0:
                container.seek(self.times[start], stream=stream)
                frames = ((self.numbers.get(frame.pts), frame) for frame in container.decode(stream))
            else:
                frames = enumerate(container.decode(stream))
            try:
                yield from ((number, frame) for number, frame in frames if number is not None)
            except av.FFmpegError:  # the damage that also ended the first pass
                return


def is_mirrored(frame):
    """Whether the display matrix of a decoded frame flips it; frame.rotation does not tell."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).astype(float)
            return a * d - b * c < 0
    return False


def is_on_its_side(frame):
    """Whether the rotation in the metadata of a decoded frame exchanges width and height."""
    return round(frame.rotation / 90) % 2 == 1


def upright_size(frame):
    """(H, W) of a decoded frame after the rotation in its metadata."""
    return (frame.width, frame.height) if is_on_its_side(frame) else (frame.height, frame.width)


def read_prompts(path):
    """Read a JSON file of prompts: {(frame, object): (points, box) or PNG}. Raises ImageError, naming the entry."""
    try:
        entries = json.loads(Path(path).read_text("utf-8-sig"))
    except ValueError as error:
        raise ImageError(f"{path}: JSON이 아닙니다 ({error})") from None
    prompts = {}
    for place, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        try:
            key = entry["frame"], entry["object"]
            points = [(float(x), float(y), label) for x, y, label in entry.get("points") or []]
            box = [float(edge) for edge in entry["box"]] if entry.get("box") else None
            is_valid = all(type(number) is int for number in (*key, *(label for _, _, label in points))) and \
                (points or box) and len(box or range(4)) == 4 and \
                np.isfinite([number for x, y, _ in points for number in (x, y)] + (box or [])).all()
            if entry.get("mask"):
                mask = base64.b64decode(entry["mask"], validate=True)
                is_valid = all(type(number) is int for number in key) and not points and decode_mask(mask).any()
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            is_valid = False
        if not is_valid:
            raise ImageError(f'{path}: {place + 1}번째 항목이 {{"frame": 0, "object": 1, '
                             '"points": [[x, y, 라벨], ...], "box": [x1, y1, x2, y2]} 형식이 아닙니다')
        if key in prompts:
            raise ImageError(f"{path}: 프레임 {key[0]}, 대상 {key[1]}의 프롬프트가 두 번 나옵니다. 하나로 합치세요")
        prompts[key] = mask if entry.get("mask") else (points, box)
    if not prompts:
        raise ImageError(f"{path}: 프롬프트가 없습니다")
    return prompts


# ---- writing ----


def track_and_save(predictor, video, prompts, args):
    """Write the prompts, track, write each mask as soon as it is predicted and the other results at the end.

    Yields (frame, label map), and (None, None) while it writes the overlay.
    """
    folder, rows = args.output, {}
    if (folder / "prompts.json").exists() and read_prompts(folder / "prompts.json") != prompts:
        (folder / "prompts.json").replace(folder / "prompts_previous.json")
    write_prompts(folder / "prompts.json", prompts)  # keeps the clicks if tracking fails
    with tqdm(total=len(video), desc="추적", unit="프레임", disable=None) as bar:
        for frame, objects, logits, scores in track(predictor, video, prompts):
            labels = label_map(objects, logits)
            if not rows:  # earlier results are kept until new ones exist
                clear(folder, args.name, args.to_data)
            write_file(folder / "masks" / f"{frame:05}.png", palette_png(labels, args.video_hash))
            bar.update(frame not in rows)
            rows[frame] = [track_row(frame, number, labels == number, score)
                           for number, score in sorted(zip(objects, scores))]
            yield frame, labels
    header = ["frame", "object", "area", "x1", "y1", "x2", "y2", "score"]
    write_csv(folder / "tracks.csv", [header, *(row for frame in sorted(rows) for row in rows[frame])])
    for _ in save_pictures(video, args, is_numbered=len({number for _, number in prompts}) > 1):
        yield None, None


def write_prompts(path, prompts):
    """The inverse of read_prompts."""
    entries = []
    for (frame, number), prompt in sorted(prompts.items()):
        given = {"mask": base64.b64encode(prompt).decode()} if isinstance(prompt, bytes) else {"points": prompt[0]}
        if not isinstance(prompt, bytes) and prompt[1]:
            given["box"] = prompt[1]
        entries.append({"frame": frame, "object": number, **given})
    write_json(path, entries)


def clear(folder, name, to_data):
    """Delete the results of earlier runs, partly written files too; pairs for training only with --to-data."""
    masks, others = earlier_results(folder, name, to_data)
    halves = [path for path in (*folder.glob("*.tmp"), *folder.glob("masks/*.tmp"))
              if re.fullmatch(rf"([0-9]{{5,}}\.png|{'|'.join(RESULTS)})\.[0-9]+\.tmp", path.name)]
    for path in (*masks, *others, *halves):
        if path.name != "prompts.json":  # already that of this run
            path.unlink()


def palette_png(labels, video_hash):
    """Encode a label map as a marked palette PNG: the pixel values are object numbers, the colours those of DAVIS.

    The palette is that of PASCAL VOC: bits 3k, 3k + 1 and 3k + 2 of the number become bit 7 - k of red, green and blue.
    """
    numbers = np.arange(256)[:, None]
    palette = sum(((numbers >> (3 * bit + np.arange(3))) & 1) << (7 - bit) for bit in range(8))
    image = Image.fromarray(labels)
    image.putpalette(palette.astype(np.uint8).ravel().tolist())
    return marked_png(image, video_hash)


def marked_png(image, video_hash):
    """Encode a PIL image as PNG with its mark()."""
    chunks, content = PngImagePlugin.PngInfo(), io.BytesIO()
    chunks.add_text("Software", mark(np.asarray(image), video_hash))
    image.save(content, "png", pnginfo=chunks)
    return content.getvalue()


def track_row(frame, number, mask, score):
    """A row of tracks.csv: area in pixels, bounding box of the mask (x2 and y2 inside; empty without one), score."""
    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), columns.max(), rows.max()] if len(rows) else [""] * 4
    return [frame, number, len(rows), *box, f"{score:.4f}"]


def save_pictures(video, args, is_numbered):
    """Read all frames and their masks again in order, and write overlay.mp4 and the pairs for training.

    A generator that yields after each frame. is_numbered: whether the masks of the pairs hold object numbers, because
    there are several objects.
    """
    folder, to_data = args.output, args.to_data
    temporary = folder / f"overlay.mp4.{os.getpid()}.tmp"
    pairs = skipped = 0
    try:
        with av.open(f"file:{temporary}", "w", format="mp4") as container:
            options = {"preset": "veryfast", "crf": "20", "bf": "0"}  # no B-frames: the last packet is the last frame
            stream = container.add_stream("libx264", rate=FOLDER_RATE, options=options)
            stream.codec_context.time_base = video.time_base
            stream.codec_context.sample_aspect_ratio = video.pixel_aspect
            for index in tqdm(range(len(video)), "저장", unit="프레임", disable=None):
                image, labels = video[index], np.array(Image.open(folder / "masks" / f"{index:05}.png"))
                frame = av.VideoFrame.from_ndarray(overlay_frame(image, labels), format="rgb24")
                if index == 0:
                    stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, "yuv420p"
                frame.pts, frame.time_base = video.times[index] - video.times[0], video.time_base
                container.mux(stream.encode(frame))
                if to_data and index % to_data == 0:
                    if labels.any():
                        save_pair(args, index, image, labels, is_numbered)
                        pairs += 1
                    else:
                        skipped += 1
                yield
            *packets, last = stream.encode()  # frames buffered by x264
            last.duration = video.end - video.times[-1]
            container.mux([*packets, last])
        temporary.replace(folder / "overlay.mp4")
    finally:
        temporary.unlink(missing_ok=True)
    if to_data:
        images, masks = (shlex.quote(str(folder / "to_data" / kind)) for kind in ("images", "masks"))
        print(f"학습용 쌍 {pairs}개 (대상이 없어 뺀 프레임 {skipped}개): "
              f"python prepare_data.py --images {images} --masks {masks}")


def overlay_frame(image, labels):
    """A frame of overlay.mp4, uint8 H x W x 3: reduced, masks drawn, padded to the even sides that H.264 requires."""
    reduced = reduce_to(labels, OVERLAY_SIDE, cv2.INTER_NEAREST_EXACT)
    drawn = overlay_labels(reduce_to(image, OVERLAY_SIDE, cv2.INTER_AREA), reduced)
    height, width = drawn.shape[:2]
    return np.pad(drawn, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def save_pair(args, index, image, labels, is_numbered):
    """Write a frame and its mask as prepare_data.py reads them: 0 and 255, or 16-bit numbers for several objects."""
    folder, name = args.output / "to_data", f"{args.name}_{index:05}.png"
    mask = labels.astype(np.uint16) if is_numbered else np.where(labels > 0, 255, 0).astype(np.uint8)
    write_file(folder / "images" / name, cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    write_file(folder / "masks" / name, marked_png(Image.fromarray(mask), args.video_hash))


if __name__ == "__main__":
    run(main, "--image-size 512나 --device cpu를 써 보세요")
