# make demo · make kvasir · make test · make lint: each creates venv/ first if it does not exist.
PYTHON ?= python3
VENV := venv
PY := $(VENV)/bin/python

.PHONY: demo demo-video demo-volume demo-ich kvasir kvasir-data test test-lowest lint system-packages

# Install torch first, then the rest without build isolation: sam2 is built from source, and an isolated build would
# install torch a second time. SAM2_BUILD_CUDA=0: the CUDA extension only fills holes in masks and is not used here.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install torch torchvision setuptools wheel
	SAM2_BUILD_CUDA=0 $(PY) -m pip install --no-build-isolation -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PY) -m pip install -r requirements-dev.txt
	touch $@

$(VENV)/.installed-extras: $(VENV)/.installed-dev extras/requirements.txt
	$(PY) -m pip install -r extras/requirements.txt
	touch $@

# Run the whole pipeline on synthetic images with a 3.7 M-parameter model: no download, no GPU, a few minutes.
# All files are written to demo/.
DEMO_MODEL := --model-cfg demo/sam2_demo.yaml --checkpoint demo/sam2_demo.pt
DEMO_VAL := demo/data/images/val
demo: $(VENV)/.installed
	$(PY) demo/make_demo_data.py
	$(PY) train_sam2_proper.py $(DEMO_MODEL) --image-dir demo/data/images/train --mask-dir demo/data/masks/train \
	  --val-image-dir $(DEMO_VAL) --val-mask-dir demo/data/masks/val --output-dir demo/output \
	  --recipe improved --prompt any
	$(PY) compare_models.py $(DEMO_MODEL) --finetuned demo/output/sam2_best.pt \
	  --image-dir $(DEMO_VAL) --mask-dir demo/data/masks/val --output-dir demo/output/comparison
	$(PY) test_my_image.py $(DEMO_MODEL) --finetuned demo/output/sam2_best.pt \
	  --image $(DEMO_VAL)/demo_0160.jpg --point "160,144" --output demo/output/my_results
	$(PY) test_my_image.py $(DEMO_MODEL) --finetuned demo/output/sam2_best.pt --auto --output demo/output/without_click \
	  --image $(DEMO_VAL)/demo_0160.jpg $(DEMO_VAL)/demo_0161.jpg $(DEMO_VAL)/demo_0162.jpg
	@echo
	@echo "그림을 열어 보세요:"
	@echo "  demo/output/comparison/compare_1.png ... compare_5.png   원본과 파인튜닝 비교"
	@echo "  demo/output/comparison/report.html                       비교 보고서: 가장 나쁜 객체부터"
	@echo "  demo/output/training_curve.png                           학습 곡선"
	@echo "  demo/output/my_results/demo_0160_result.png              클릭 하나로 분할"
	@echo "  demo/output/without_click/demo_0160_result.png           같은 이미지를 클릭 없이 분할 (세 장, auto.csv)"

# Run extras/ on synthetic data with the demo model: track a polyp through a clip, segment a haemorrhage in a CT volume.
demo-video: $(VENV)/.installed-extras
	$(PY) extras/demo/make_demo_clip.py
	$(PY) extras/track_video.py $(DEMO_MODEL) --original --video extras/demo/data/clip.mp4 --box "97,61,214,184" \
	  --output extras/demo/output/clip
	$(PY) extras/demo/score_clip.py extras/demo/output/clip

demo-volume: $(VENV)/.installed-extras
	$(PY) extras/demo/make_demo_volume.py
	$(PY) extras/segment_volume.py $(DEMO_MODEL) --original --volume extras/demo/data/ct.nii.gz \
	  --point "25,145,146" \
	  --truth extras/demo/data/ct_truth.nii.gz --output extras/demo/output/ct

# Train extras/sam_med3d_ich on synthetic head CTs with a 3.4 M-parameter model: no download, no GPU, a few minutes.
ICH_DATA := extras/demo/data/ich
ICH_OUTPUT := extras/demo/output/ich
demo-ich: $(VENV)/.installed-extras
	$(PY) extras/demo/draw_ich_dataset.py
	$(PY) extras/sam_med3d_ich/train.py --train_csv $(ICH_DATA)/train.csv --val_csv $(ICH_DATA)/val.csv \
	  --mask_dir $(ICH_DATA)/masks --output_dir $(ICH_OUTPUT) --model_size small --spacing 4 --keep_in_memory \
	  --epochs 28 --gradient_accumulation_steps 1 --lr 4e-4 --num_clicks 1 --scheduler_type cosine
	@echo
	@echo "그림과 표를 열어 보세요:"
	@echo "  $(ICH_OUTPUT)/training_curve.png   학습 곡선"
	@echo "  $(ICH_OUTPUT)/patients.png         Dice가 가장 낮은, 중간, 가장 높은 환자"
	@echo "  $(ICH_OUTPUT)/patients.csv         환자마다의 Dice, IoU, 부피 오차, 라벨"

# Measure with the official weights: download them (184 MB) and Kvasir-SEG (46 MB), train, compare, and print the result
# beside that of the reference guide. Everything goes to output/kvasir/ (the weights to checkpoints/). After an
# interruption the same command continues and repeats no finished step. RECIPE=improved or strongest selects another
# recipe. MODEL adds flags to training and comparison, TRAIN to training; --resume must accept them.
RECIPE := reference
KVASIR_DATA := output/kvasir/data
KVASIR_RUN := output/kvasir/$(RECIPE)
kvasir: $(KVASIR_RUN)/comparison/summary.json
	@$(PY) benchmarks/print_kvasir.py $<

kvasir-data: $(VENV)/.installed
	$(PY) download_dataset.py --checkpoint small
	$(PY) download_dataset.py --data-dir $(KVASIR_DATA)

$(KVASIR_RUN)/sam2_final.pt: | kvasir-data
	$(PY) train_sam2_proper.py $(if $(wildcard $(KVASIR_RUN)/sam2_last.pt),--resume,--recipe $(RECIPE)) \
	  $(MODEL) $(TRAIN) --output-dir $(KVASIR_RUN) \
	  --image-dir $(KVASIR_DATA)/images/train --mask-dir $(KVASIR_DATA)/masks/train \
	  --val-image-dir $(KVASIR_DATA)/images/val --val-mask-dir $(KVASIR_DATA)/masks/val

$(KVASIR_RUN)/comparison/summary.json: $(KVASIR_RUN)/sam2_final.pt
	$(PY) compare_models.py $(MODEL) --finetuned $(KVASIR_RUN)/sam2_best.pt \
	  --image-dir $(KVASIR_DATA)/images/val --mask-dir $(KVASIR_DATA)/masks/val --output-dir $(KVASIR_RUN)/comparison

# The tests drive a real window. As root on Debian, this installs the packages that they need.
system-packages:
	@sh tests/install_system_packages.sh

test: system-packages lint $(VENV)/.installed-extras
	$(PY) -m pytest

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .

# Run the demo and the scripts' tests with exactly the lowest versions that requirements.txt allows (they have wheels
# for Python 3.10 to 3.12). Not part of `make test`.
LOWEST := venv-lowest
SCRIPT_TESTS := $(foreach name,functions prepare download train compare window robust demo,tests/test_$(name).py)
test-lowest: system-packages
	mkdir -p $(LOWEST)
	sed -n 's/>=\([^,]*\).*/==\1/p' requirements.txt > $(LOWEST)/lowest.txt
	PIP_CONSTRAINT=$(CURDIR)/$(LOWEST)/lowest.txt $(MAKE) VENV=$(LOWEST) demo $(LOWEST)/.installed-dev
	$(LOWEST)/bin/python -m pytest $(SCRIPT_TESTS)
