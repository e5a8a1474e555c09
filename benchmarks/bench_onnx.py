"""Compare the files of extras/export_onnx.py with torch on the CPU: size, time, and IoU on data of your own.

    python benchmarks/bench_onnx.py

The model is sam2.1_hiera_s at 1024 px with random weights: right for speed, meaningless for quality. Torch and the
variants of the files (float32, --fp16, --int8) alternate. --checkpoint with --image-dir and --mask-dir adds the IoU of
the mask with the highest score for the click of compare_models.py, one object per image.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import torch
from bench_training import ROOT, save_random_weights, timed

sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
import export_onnx  # noqa: E402

import compare_models as project  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-cfg", default="configs/sam2.1/sam2.1_hiera_s.yaml")
    parser.add_argument("--checkpoint", help="default: random weights")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--image-dir", type=Path)
    parser.add_argument("--mask-dir", type=Path)
    parser.add_argument("--num-images", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = args.checkpoint or save_random_weights(args.model_cfg, folder / "random.pt")
        predictor = project.load_predictor(args.model_cfg, checkpoint, "cpu")
        side = predictor.model.image_size
        print(f"{args.model_cfg}, {side} px, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}")
        decoder = folder / "decoder.onnx"
        encoders = {form: folder / f"{form}.onnx" for form in ("float32", "fp16", "int8")}
        export_onnx.export_files(predictor.model, encoders["float32"], decoder)
        for form, reduce in (("fp16", export_onnx.halve_weights), ("int8", export_onnx.quantize_weights)):
            shutil.copy(encoders["float32"], encoders[form])
            reduce(encoders[form])
        for form, path in {**encoders, "decoder": decoder}.items():
            print(f"{form}: {path.stat().st_size / 1e6:.1f} MB")
        for threads in args.threads:
            print_seconds(predictor, encoders, decoder, threads, args.repeats)
        if args.image_dir:
            print_iou(predictor, encoders, decoder, project.find_pairs(args.image_dir, args.mask_dir)[:args.num_images])


def print_seconds(predictor, encoders, decoder, threads, repeats):
    """Encode one image and decode one click with torch and each variant of the files, in turn, on `threads` threads.

    Both sides compute the same: torch runs the modules that were exported, without resizing.
    """
    torch.set_num_threads(threads)
    side = predictor.model.image_size
    pixels, point = normalize(export_onnx.probe_image(side), side), np.array([[side / 2, side / 2]])
    decode = open_session(decoder, threads)
    inputs = {**encode_pixels(open_session(encoders["float32"], threads), pixels), **click(decode, point)}
    decoder_inputs = [torch.from_numpy(inputs[item.name]) for item in decode.get_inputs()]
    calls = {"torch": (export_onnx.Encoder(predictor.model), torch.from_numpy(pixels)),
             **{form: (encode_pixels, open_session(path, threads), pixels) for form, path in encoders.items()},
             "torch's decoder": (export_onnx.Decoder(predictor.model), *decoder_inputs),
             "decoder": (decode.run, None, inputs)}
    rows = []
    for _ in range(repeats + 1):
        rows.append([])
        for call in calls.values():
            time.sleep(0.2)  # ONNX Runtime's threads stay busy for a moment after a run
            with torch.inference_mode():
                rows[-1].append(timed("cpu", *call))
    seconds = dict(zip(calls, np.median(rows[1:], axis=0)))  # the first warms up
    for form in (*encoders, "decoder"):
        reference = seconds["torch's decoder" if form == "decoder" else "torch"]
        print(f"{threads} threads, {form}: {seconds[form]:.3f} s, torch {reference:.3f} s, "
              f"ratio {reference / seconds[form]:.2f}x", flush=True)


def print_iou(predictor, encoders, decoder, pairs):
    """Print the mean IoU of torch and of the files with the truth, and of the files with torch."""
    encoders = {form: open_session(path) for form, path in encoders.items()}
    decode, side, rows = open_session(decoder), predictor.model.image_size, []
    for image_path, mask_path in pairs:
        _, image, labels = project.read_pair((image_path, mask_path))
        truth = labels == labels[labels > 0].min()
        point = project.middle_point(truth)
        pixels = normalize(image, side)
        predictor.set_image(image)
        masks, scores, _ = predictor.predict(point, np.ones(1), multimask_output=True)
        found = [masks[scores.argmax()] > 0]
        for encode in encoders.values():
            logits, scores = decode_point(decode, encode_pixels(encode, pixels), point * side / image.shape[1::-1])
            found.append(cv2.resize(logits[0, scores[0].argmax()], image.shape[1::-1]) > 0)
        rows.append([[project.calculate_iou(mask, truth), project.calculate_iou(mask, found[0])] for mask in found])
    for form, (with_truth, with_torch) in zip(["torch", *encoders], np.mean(rows, axis=0)):
        print(f"{len(pairs)} images, {form}: IoU {with_truth:.4f}, IoU with torch's masks {with_torch:.4f}")


def open_session(path, threads=0):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def normalize(image, side):
    """An image, uint8 H x W x 3, as the encoder's input, as the guide computes it: float32 1 x 3 x side x side."""
    rows, columns = (resize_weights(size, side) for size in image.shape[:2])
    pixels = ((image / 255 - export_onnx.MEAN) / export_onnx.STD).transpose(2, 0, 1)
    return (rows @ pixels @ columns.T).astype(np.float32)[None]


def resize_weights(size, side):
    """side x size matrix that resizes as torchvision does: bilinear, with antialiasing where it shrinks."""
    centers = (np.arange(side)[:, None] + 0.5) * size / side
    weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centers) / max(size / side, 1))
    return weights / weights.sum(axis=1, keepdims=True)


def encode_pixels(session, pixels):
    return dict(zip(export_onnx.FEATURES, session.run(export_onnx.FEATURES, {"image": pixels})))


def decode_point(session, features, point):
    """Masks 1 x 3 x h x w and scores 1 x 3 for one click, float 1 x 2, in pixels of the encoder's input."""
    return session.run(None, {**features, **click(session, point)})


def click(session, point):
    """The decoder's inputs for one click, besides the features."""
    mask_input = np.zeros((1, 1, *session.get_inputs()[5].shape[2:]), np.float32)
    return {"point_coords": point[None].astype(np.float32), "mask_input": mask_input,
            "point_labels": np.ones((1, 1), np.float32), "has_mask_input": np.zeros(1, np.float32)}


if __name__ == "__main__":
    main()
