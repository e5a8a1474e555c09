# make demo · make test · make lint: each sets up venv/ first, from nothing.
PYTHON ?= python3
PY := venv/bin/python

.PHONY: demo test lint system-packages

# SAM2_BUILD_CUDA=0: the CUDA extension only fills holes in masks, which no script here does.
venv/.installed: requirements.txt
	$(PYTHON) -m venv venv
	SAM2_BUILD_CUDA=0 $(PY) -m pip install -r requirements.txt
	touch $@

venv/.installed-dev: venv/.installed requirements-dev.txt
	$(PY) -m pip install -r requirements-dev.txt
	touch $@

# The whole pipeline on drawn images with a model of 2 M parameters: no download, no GPU, a few minutes.
# Only --lr and --iterations differ from the training's defaults. Everything is written below demo/.
DEMO_MODEL := --model-cfg demo/sam2_demo.yaml --checkpoint demo/sam2_demo.pt
DEMO_VAL := demo/data/images/val
demo: venv/.installed
	$(PY) demo/make_demo_data.py
	$(PY) train_sam2_proper.py $(DEMO_MODEL) --image-dir demo/data/images/train --mask-dir demo/data/masks/train \
	  --val-image-dir $(DEMO_VAL) --val-mask-dir demo/data/masks/val --output-dir demo/output \
	  --lr 1e-4 --iterations 2000
	$(PY) compare_models.py $(DEMO_MODEL) --finetuned demo/output/sam2_best.pt \
	  --image-dir $(DEMO_VAL) --mask-dir demo/data/masks/val --output-dir demo/output/comparison
	$(PY) test_my_image.py $(DEMO_MODEL) --finetuned demo/output/sam2_best.pt \
	  --image $(DEMO_VAL)/demo_0160.jpg --point "160,144" --output demo/output/my_results
	@echo
	@echo "그림을 열어 보세요:"
	@echo "  demo/output/comparison/compare_1.png ... compare_5.png   원본과 파인튜닝 비교"
	@echo "  demo/output/comparison/scatter.png                       이미지마다의 IoU"
	@echo "  demo/output/training_curve.png                           학습 곡선"
	@echo "  demo/output/my_results/demo_0160_result.png              이미지 한 장 분할"

# The tests drive a real window; as root on Debian they install what that takes.
system-packages:
	@sh tests/install_system_packages.sh

test: system-packages lint
	$(PY) -m pytest

lint: venv/.installed-dev
	$(PY) -m ruff check .
