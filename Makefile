# `make train` and `make test` each do all the set-up they need; both rest on `make setup`.
PYTHON ?= python3
# As fasttr/before_torch.py has it, for whatever runs here.
ifndef OMP_WAIT_POLICY
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT ?= 3000
endif
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup train ocrm test test-slow lint bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "set-up, step 1 of 3: a virtual environment in $(VENV) (some seconds)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "set-up, step 2 of 3: installing torch, transformers and others (about 90 s where the network is fast)"
	$(PY) -m pip install --quiet -c constraints.txt -e '.[train,bench,test]'
	@echo "set-up, step 3 of 3: checking that the packages fit each other (some seconds)"
	$(PY) -m pip check
	touch $@

train: setup
	$(VENV)/bin/fasttr demo --output_dir runs/demo

ocrm: setup
	$(VENV)/bin/fasttr ocrm --demo --output_dir runs/ocrm-demo

test: setup
	$(PY) -m pytest

test-slow: setup
	$(PY) -m pytest -m slow

bench: setup
	$(PY) -m bench all --budget 4m --out runs/bench

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The site in site/, every link checked. What it needs beyond the set-up is small, and fetched here.
docs: setup
	$(PY) -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "open site/index.html, or: $(PY) -m mkdocs serve"

clean:
	rm -rf $(VENV) runs site
