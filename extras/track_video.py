"""Follow objects through a video with SAM 2.1: prompt some frames, get a mask for every frame.

    python extras/track_video.py --video clip.mp4 --point "320,200"
    python extras/track_video.py --video frames/ --prompts prompts.json
    python extras/track_video.py --video clip.mp4                       a window

Frames are decoded when they are needed and old memories are dropped, so a long video takes no more memory than
a short one.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import shlex
from bisect import bisect
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from common import (
    ImageError,
    add_model_flags,
    choose_checkpoint,
    detect_device,
    fail,
    load_video_predictor,
    read_image,
    run,
    write_file,
    write_json,
)
from matplotlib import pyplot as plt
from PIL import Image, PngImagePlugin
from tqdm import tqdm
from tracking import (
    Window,
    as_label,
    check_prompts,
    label_map,
    overlay,
    parse_numbers,
    reduce_to,
    require_display,
    track,
)

FORMATS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # taken from a folder
FOLDER_RATE = 25             # frames a second of the overlay of a folder
OVERLAY_SIDE = 1280          # pixels: the overlay of a larger video is reduced to this
KEPT_BYTES = 64 * 2**20      # of decoded frames, for going backwards
RESULTS = ("overlay.mp4", "tracks.csv", "prompts.json")  # beside masks/
MARK = "track_video.py"      # the text "Software" in each mask's PNG: masks without it are somebody else's
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises for other files


def main():
    args = parse_args()
    if args.interactive:
        require_display('--point "x,y"나 --prompts')
    else:
        plt.switch_backend("Agg")
    check_output(args)
    video = open_video(args.video)
    prompts = read_prompts(args.prompts) if args.prompts else \
        {(args.frame or 0, 1): (args.point, args.box)} if args.point or args.box else {}
    check_prompts(prompts, video, args.prompts or args.video, "프레임")

    checkpoint, device = choose_checkpoint(args), detect_device(args.device)
    predictor = load_video_predictor(args.model_cfg, checkpoint, device, args.image_size)
    height, width = video.size
    print(f"모델: {checkpoint}, 장치: {device}, 영상: {len(video)}프레임, 가로 {width}, 세로 {height}픽셀")

    def follow(prompts):
        return track_and_save(predictor, video, prompts, args.output, args.name, args.to_data)

    is_tracked = False
    if args.interactive:
        print("창에서 좌클릭은 전경, 우클릭은 배경, 끌면 상자, 숫자 키는 대상 번호입니다. "
              "Enter를 누르면 추적하고 저장합니다.")
        window = Window(video, predictor, follow, args.name.encode(errors="replace").decode())
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
    parser.add_argument("--point", "-p", type=parse_points, default=[],
                        help='대상 1의 점: "x,y" 또는 "x,y,라벨;x,y,라벨" (라벨 1 전경, 0 배경; 기본 1)')
    parser.add_argument("--box", type=parse_box, help='대상 1의 상자: "x1,y1,x2,y2"')
    parser.add_argument("--frame", type=int, help="--point와 --box의 프레임 번호, 0부터 (기본: 0)")
    parser.add_argument("--prompts", metavar="FILE",
                        help='JSON 프롬프트: [{"frame": 0, "object": 1, "points": [[x, y, 라벨], ...], '
                             '"box": [x1, y1, x2, y2]}, ...]')
    parser.add_argument("--to-data", type=int, metavar="N",
                        help="N 프레임마다 이미지와 마스크를 to_data/에 남김 (prepare_data.py로 이어서 학습에 씀)")
    add_model_flags(parser, "output/my_tracks/이름")
    args = parser.parse_args()
    if args.prompts and (args.point or args.box):
        parser.error("--prompts와 --point, --box는 함께 쓸 수 없습니다")
    if args.frame is not None and not (args.point or args.box):
        parser.error("--frame은 --point나 --box와 함께 씁니다")
    if args.to_data is not None and args.to_data < 1:
        parser.error("--to-data는 1 이상이어야 합니다")
    path = Path(args.video)
    args.name = path.resolve().name if path.is_dir() else path.stem
    if args.output == parser.get_default("output"):
        args.output = args.output.with_name(args.name)
    args.interactive = not (args.prompts or args.point or args.box)
    return args


def check_output(args):
    """Say which results of an earlier run will be overwritten; fail if anything else would be.

    An earlier run is known by its masks: each bears MARK.
    """
    folder = args.output
    if Path(args.video).resolve() in [(folder / name).resolve() for name in ("masks", "to_data/images", "overlay.mp4")]:
        fail(f"{args.video}: 결과를 쓸 자리에 있습니다. 다른 --output을 쓰세요")
    masks, others = earlier_results(folder, args.name, args.to_data)
    foreign = [path for path in masks if not is_marked(path)] if masks else \
        [path for path in others if not (args.prompts and path.resolve() == Path(args.prompts).resolve())]
    if foreign:
        fail(f"{foreign[0]}: 이 스크립트가 쓴 것이 아니어서 덮어쓰지 않습니다. 다른 --output을 쓰세요")
    if masks:
        names = sorted({path.relative_to(folder).parts[0] for path in (*masks, *others)})
        print(f"이전 결과를 덮어씁니다: {folder} ({', '.join(names)})")
    if not args.to_data and (folder / "to_data").exists():
        print(f"주의: {folder / 'to_data'}는 이전에 남긴 것입니다. --to-data가 없어 그대로 둡니다")


def earlier_results(folder, name, to_data):
    """The files below `folder` that have names of this script's: its masks, and the others."""
    masks = [path for path in sorted(folder.glob("masks/*.png")) if re.fullmatch("[0-9]{5,}", path.stem)]
    pairs = [path for path in sorted(folder.glob("to_data/*/*.png"))
             if to_data and re.fullmatch(f"{re.escape(name)}_[0-9]{{5,}}", path.stem)]
    return masks, [*(path for result in RESULTS if (path := folder / result).exists()), *pairs]


def is_marked(path):
    """Whether a mask is one of this script's."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except UNREADABLE:
        return False


def parse_points(text):
    """Parse "x,y" or "x,y,label;x,y,label": a list of (x, y, label), in pixels."""
    return [(x, y, as_label(*label or [1])) for x, y, *label in parse_numbers(text, (2, 3), '"x,y" 또는 "x,y,라벨"')]


def parse_box(text):
    """Parse "x1,y1,x2,y2": a list of floats, in pixels, x1 <= x2 and y1 <= y2."""
    (x1, y1, x2, y2), *others = parse_numbers(text, (4,), '"x1,y1,x2,y2"')
    if others:
        raise argparse.ArgumentTypeError("상자는 하나여야 합니다. 대상이 여럿이면 --prompts를 쓰세요")
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


# ----------------------------------------------------------------------------- reading

def open_video(path):
    """The frames of a video file or of a folder of images, as tracking.py takes them. Raises ImageError."""
    return ImageFolder(Path(path)) if Path(path).is_dir() else VideoFile(Path(path))


class ImageFolder:
    """The images of a folder in natural order (2.jpg before 10.jpg), read when they are asked for.

    Only the headers are read at first: an image that is none, or of another size, is an error before anything is
    tracked. Also holds time_base and times, as a video does.
    """

    def __init__(self, path):
        self.paths = sorted((file for file in path.iterdir() if file.suffix.lower() in FORMATS), key=natural_order)
        if not self.paths:
            raise ImageError(f"{path}: 폴더에 이미지가 없습니다 ({', '.join(FORMATS)})")
        self.size = image_size(self.paths[0])
        for file in self.paths[1:]:
            self.check_size(file, image_size(file))
        self.time_base, self.times = Fraction(1, FOLDER_RATE), range(len(self.paths))

    def check_size(self, file, size):
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
    """A key that sorts numbers in names by their value."""
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", path.name.lower())], path.name


def image_size(path):
    """(H, W) of an image file when upright, from its header. Raises ImageError."""
    try:
        with Image.open(path) as image:
            size = image.size if image.getexif().get(0x0112, 1) >= 5 else image.size[::-1]  # EXIF: lies on its side
    except UNREADABLE:
        raise ImageError(f"{path}: 이미지 파일이 아니거나 손상되었습니다") from None
    return size


class VideoFile:
    """The frames of a video file, upright, decoded when they are asked for.

    A first pass decodes the whole file and keeps nothing but the frames' times: their exact number is known and
    what is damaged is found before anything is tracked. Raises ImageError if there are no frames, or if they change
    their size. A file that ends too early or is damaged is used up to there, which is said.
    times: of each frame, in units of time_base seconds, as in the file.
    """

    def __init__(self, path):
        self.path, self.times, self.keys, self.size = path, [], [], None
        is_whole = self.read_through()
        if not self.times:
            raise ImageError(f"{path}: 읽을 수 있는 프레임이 없습니다")
        if not is_whole:
            print(f"주의: {path}는 중간에서 끝나거나 손상되었습니다. 읽을 수 있는 {len(self.times)}프레임만 씁니다")
        has_times = None not in self.times and all(map(int.__lt__, self.times, self.times[1:]))
        if not has_times:
            self.times, self.time_base = range(len(self.times)), 1 / (self.rate or Fraction(FOLDER_RATE))
        if not (has_times and is_whole):  # nothing to seek by, or an index that may be wrong
            self.keys = []
        self.numbers = {time: number for number, time in enumerate(self.times)}
        height, width = self.size
        self.kept_frames = max(2, min(64, KEPT_BYTES // (height * width * 3 // 2)))
        self.kept, self.decoding, self.next = {}, iter(()), math.inf  # {number: frame}, frames to come, their first

    def open(self):
        """The opened container and its first video stream. Raises ImageError."""
        try:
            container = av.open(str(self.path), metadata_errors="replace")
        except av.FFmpegError as error:
            raise ImageError(f"{self.path}: 영상을 열 수 없습니다 ({error.strerror})") from None
        if not container.streams.video:
            raise ImageError(f"{self.path}: 영상이 들어 있지 않습니다")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return container, stream

    def read_through(self):
        """Decode every frame once for times, key frames and size. Returns whether the file is whole."""
        container, stream = self.open()
        packets = end = 0
        with container, tqdm(desc="영상 확인", unit="프레임", leave=False, disable=None) as bar:
            self.time_base, self.rate = stream.time_base, stream.average_rate
            try:
                for packet in container.demux(stream):
                    packets += packet.size > 0
                    for frame in packet.decode():
                        size = upright_size(frame)
                        if self.size not in (None, size):
                            raise ImageError(f"{self.path}: {len(self.times)}번 프레임부터 크기가 다릅니다. 가로 "
                                             f"{self.size[1]}, 세로 {self.size[0]} → 가로 {size[1]}, 세로 {size[0]}")
                        self.size = size
                        if frame.key_frame:
                            self.keys.append(len(self.times))
                        self.times.append(frame.pts)
                        end = (frame.pts or 0) + (frame.duration or 0)
                        bar.update()
            except av.FFmpegError:
                return False
            # an MP4 or MOV trimmed by its edit list holds more frames than it shows, but lasts as long as it says
            is_trimmed = "mp4" in container.format.name and \
                end >= (stream.start_time or 0) + (stream.duration or math.inf)
            return packets >= stream.frames or is_trimmed  # 0 where the container does not say

    def __len__(self):
        return len(self.times)

    def __getitem__(self, index):
        if index not in self.kept:
            place = bisect(self.keys, index)
            key = self.keys[place - 1] if place else 0
            if index < self.next or key > self.next:
                self.kept, self.decoding = {}, self.decode_from(key)
            self.decode_until(index)
            if index not in self.kept and key > 0:  # a container that does not seek to where it should
                self.kept, self.decoding = {}, self.decode_from(0)
                self.decode_until(index)
            if index not in self.kept:
                raise ImageError(f"{self.path}: {index}번 프레임을 다시 읽을 수 없습니다")
        frame = self.kept[index]
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))

    def decode_until(self, index):
        """Decode on to frame `index`; keep it and the ones just before it, for whoever goes backwards."""
        for number, frame in self.decoding:
            if len(self.kept) == self.kept_frames:
                del self.kept[min(self.kept)]
            self.kept[number] = frame
            self.next = number + 1
            if number >= index:
                break

    def decode_from(self, start):
        """Yield (number, frame) from a key frame on, or from the beginning (0)."""
        container, stream = self.open()
        with container:
            if start > 0:
                container.seek(self.times[start], stream=stream)
                frames = ((self.numbers.get(frame.pts), frame) for frame in container.decode(stream))
            else:
                frames = enumerate(container.decode(stream))
            try:
                yield from ((number, frame) for number, frame in frames if number is not None)
            except av.FFmpegError:  # where the first pass ended too
                return


def upright_size(frame):
    """(H, W) of a decoded frame when it is turned as its metadata says."""
    return (frame.width, frame.height) if round(frame.rotation / 90) % 2 else (frame.height, frame.width)


def read_prompts(path):
    """Read a JSON file of prompts: {(frame, object): (points, box)}. Raises ImageError, naming the entry."""
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
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            is_valid = False
        if not is_valid:
            raise ImageError(f'{path}: {place + 1}번째 항목이 {{"frame": 0, "object": 1, '
                             '"points": [[x, y, 라벨], ...], "box": [x1, y1, x2, y2]} 형식이 아닙니다')
        if key in prompts:
            raise ImageError(f"{path}: 프레임 {key[0]}, 대상 {key[1]}의 프롬프트가 두 번 나옵니다. 하나로 합치세요")
        prompts[key] = points, box
    if not prompts:
        raise ImageError(f"{path}: 프롬프트가 없습니다")
    return prompts


# ----------------------------------------------------------------------------- writing

def track_and_save(predictor, video, prompts, folder, name, to_data):
    """Track, and write each mask as soon as it is known, the rest at the end. Yields (frame, label map)."""
    rows = {}
    with tqdm(total=len(video), desc="추적", unit="프레임", disable=None) as bar:
        for frame, objects, logits, scores in track(predictor, video, prompts):
            labels = label_map(objects, logits)
            if not rows:  # earlier results stay until there are new ones
                clear(folder, name, to_data)
                write_prompts(folder / "prompts.json", prompts)
            write_file(folder / "masks" / f"{frame:05}.png", palette_png(labels))
            bar.update(frame not in rows)
            rows[frame] = [track_row(frame, number, labels == number, score)
                           for number, score in sorted(zip(objects, scores))]
            yield frame, labels
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["frame", "object", "area", "x1", "y1", "x2", "y2", "score"])
    writer.writerows(row for frame in sorted(rows) for row in rows[frame])
    write_file(folder / "tracks.csv", text.getvalue().encode())
    save_pictures(video, folder, name, to_data, is_numbered=len({number for _, number in prompts}) > 1)


def write_prompts(path, prompts):
    """The inverse of read_prompts."""
    write_json(path, [{"frame": frame, "object": number, "points": points, **({"box": box} if box else {})}
                      for (frame, number), (points, box) in sorted(prompts.items())])


def clear(folder, name, to_data):
    """Take away what earlier runs have left, half-written files too; pairs for training only with --to-data."""
    masks, others = earlier_results(folder, name, to_data)
    halves = [path for path in (*folder.glob("*.tmp"), *folder.glob("masks/*.tmp"))
              if re.fullmatch(rf"([0-9]{{5,}}\.png|{'|'.join(RESULTS)})\.[0-9]+\.tmp", path.name)]
    for path in (*masks, *others, *halves):
        if path.name != "prompts.json":  # is replaced
            path.unlink()


def palette_png(labels):
    """A label map as the bytes of a palette PNG with MARK: objects' numbers as pixel values, in the colours of DAVIS.

    The palette is PASCAL VOC's: bit k of a number's three lowest bits goes to bit 7 - k of red, green and blue.
    """
    numbers = np.arange(256)[:, None]
    palette = sum(((numbers >> (3 * bit + np.arange(3))) & 1) << (7 - bit) for bit in range(8))
    image = Image.fromarray(labels)
    image.putpalette(palette.astype(np.uint8).ravel().tolist())
    mark, content = PngImagePlugin.PngInfo(), io.BytesIO()
    mark.add_text("Software", MARK)
    image.save(content, "png", pnginfo=mark)
    return content.getvalue()


def track_row(frame, number, mask, score):
    """A line of tracks.csv: area in pixels, the mask's tight box (both ends inside) or nothing, score 0 to 1."""
    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), columns.max(), rows.max()] if len(rows) else [""] * 4
    return [frame, number, len(rows), *box, f"{score:.4f}"]


def save_pictures(video, folder, name, to_data, is_numbered):
    """Go through the frames and their masks once more, in order: write overlay.mp4, and pairs for training.

    is_numbered: whether there are several objects, so that the pairs' masks must tell them apart.
    """
    temporary = folder / f"overlay.mp4.{os.getpid()}.tmp"
    pairs = skipped = 0
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=FOLDER_RATE, options={"preset": "veryfast", "crf": "20"})
            stream.codec_context.time_base = video.time_base
            for index in tqdm(range(len(video)), "저장", unit="프레임", disable=None):
                image, labels = video[index], np.array(Image.open(folder / "masks" / f"{index:05}.png"))
                frame = av.VideoFrame.from_ndarray(overlay_frame(image, labels), format="rgb24")
                if index == 0:
                    stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, "yuv420p"
                frame.pts, frame.time_base = video.times[index] - video.times[0], video.time_base
                container.mux(stream.encode(frame))
                if to_data and index % to_data == 0:
                    skipped += not labels.any()
                    if labels.any():
                        pairs += 1
                        save_pair(folder / "to_data", f"{name}_{index:05}.png", image, labels, is_numbered)
            container.mux(stream.encode())
        temporary.replace(folder / "overlay.mp4")
    finally:
        temporary.unlink(missing_ok=True)
    if to_data:
        images, masks = (shlex.quote(str(folder / "to_data" / kind)) for kind in ("images", "masks"))
        print(f"학습용 쌍 {pairs}개 (대상이 없어 뺀 프레임 {skipped}개): "
              f"python prepare_data.py --images {images} --masks {masks}")


def overlay_frame(image, labels):
    """A frame of overlay.mp4: reduced, the masks over it, sides even as H.264 asks for: uint8 H x W x 3."""
    drawn = overlay(reduce_to(image, OVERLAY_SIDE, cv2.INTER_AREA), reduce_to(labels, OVERLAY_SIDE, cv2.INTER_NEAREST))
    height, width = drawn.shape[:2]
    return np.pad(drawn, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def save_pair(folder, name, image, labels, is_numbered):
    """Write a frame and its mask as prepare_data.py takes them: 0 and 255, or 16-bit numbers for several objects."""
    mask = labels.astype(np.uint16) if is_numbered else np.where(labels > 0, 255, 0).astype(np.uint8)
    for kind, array in (("images", image[..., ::-1]), ("masks", mask)):
        write_file(folder / kind / name, cv2.imencode(".png", array)[1].tobytes())


if __name__ == "__main__":
    run(main, "--image-size 512나 --device cpu를 써 보세요")
