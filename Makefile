# make demo: install, train on the sample dataset, classify test_images/.
# make test: install, run every test. make test-fast: only those that take under a second. make lint: ruff.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast lint

demo: $(VENV)/installed sample_run/trained
	$(BIN)/python zero_shot_demo.py --checkpoint_path sample_run/saved_checkpoints --img_dir test_images --show_predictions

# Beside other work, threads that spin while they wait make the tests six times slower than threads that sleep.
test test-fast: export OMP_WAIT_POLICY = passive
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The model is trained once; to train again: rm -r sample_run
sample_run/trained: | $(VENV)/installed
	$(BIN)/python train.py --sample
	touch $@

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet pytest hypothesis ruff onnx onnxscript onnxruntime pandas "webdataset==0.2.86"  # the last two: open_clip's own loader
	touch $@
