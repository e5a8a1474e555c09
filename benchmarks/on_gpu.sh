#!/bin/sh
# Measure on one NVIDIA GPU what benchmarks/README.md reports, in about 15 minutes; nothing else may run there.
#
#     sh benchmarks/on_gpu.sh KVASIR_DIR      a folder data/ made by download_dataset.py or prepare_data.py
#
# Random weights in the architecture of SAM 2.1: right for speed, meaningless for quality.
set -eu
data=$1
out=${OUT:-output/on_gpu}
python=${PYTHON:-venv/bin/python}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
for size in s l; do
    for batch in 1 4 16; do
        $python benchmarks/bench_training.py --model-cfg "configs/sam2.1/sam2.1_hiera_$size.yaml" --device cuda \
            --images 100 --batch-size $batch
    done
done
$python benchmarks/bench_compare.py --device cuda
$python - "$out/random.pt" <<'PYTHON'
import sys
sys.path.insert(0, "benchmarks")
from bench_training import save_random_weights
save_random_weights("configs/sam2.1/sam2.1_hiera_s.yaml", sys.argv[1])
PYTHON
for flags in "--recipe improved" "--encoder full --batch-size 4 --iterations 60"; do
    # shellcheck disable=SC2086
    $python train_sam2_proper.py --checkpoint "$out/random.pt" --device cuda --output-dir "$out/run" $flags \
        --image-dir "$data/images/train" --mask-dir "$data/masks/train" \
        --val-image-dir "$data/images/val" --val-mask-dir "$data/masks/val"
    rm -r "$out/run"
done
# Where the time of a step goes: the share of waiting is that of cudaStreamSynchronize and cudaMemcpyAsync
$python - "$out/random.pt" "$data" <<'PYTHON'
import sys
from torch.profiler import ProfilerActivity, profile
checkpoint, data = sys.argv[1:]
sys.argv = ["profile", "--checkpoint", checkpoint, "--device", "cuda", "--recipe", "improved", "--batch-size", "16",
            "--image-dir", f"{data}/images/train", "--mask-dir", f"{data}/masks/train", "--val-image-dir", "none"]
sys.path.insert(0, ".")
import train_sam2_proper as project
training = project.Training(project.parse_args(), "cuda")
for iteration in range(1, 101):
    training.step(iteration)
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
    for iteration in range(101, 111):
        training.step(iteration)
    training.fetch()
print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
print(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=15))
PYTHON
