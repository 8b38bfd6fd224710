# make help tells what there is.
#
# PYTHON=python3.11   interpreter that makes the environment, any from 3.9 on
# VENV=folder         environment to make and use; VENV= (empty) takes PYTHON as it is and installs nothing
# OLDEST_VENV=folder  environment of test-oldest; OLDEST_PYTHON=path names its interpreter, which is searched for else,
#                     and with SKIP_OLDEST=1 there need be none

PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
export OLDEST_PYTHON
OUTPUT := output/quickstart
# Models this small gain little from a second thread, and lose much when they share the cores with other work.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

ifeq ($(strip $(VENV)),)
  RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
  INSTALLED :=
else
  RUN := $(VENV)/bin/python
  INSTALLED := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
# Of the versions of Python and torch depend above all arithmetic, autocast and the cutting of detectors into stages.
OLDEST_TESTS := tests/methods/test_mixed_precision.py $(addprefix tests/,test_staged.py test_distiller.py golden \
  losses assigners regions boxes layers oldest)

.PHONY: help install quickstart test robustness test-oldest

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make the environment, or bring it up to date with setup.py

quickstart: $(INSTALLED)  ## train a teacher, a plain and a distilled student on small real data, compare and export
	$(RUN) datasets/prepare_quickstart.py
	$(ONE_THREAD) $(RUN) train_net.py --config-file configs/quickstart/teacher.yaml --resume
	$(ONE_THREAD) $(RUN) train_net.py --config-file configs/quickstart/student.yaml --resume
	$(ONE_THREAD) $(RUN) train_net.py --config-file configs/quickstart/distilled.yaml --resume
	$(ONE_THREAD) $(RUN) tools/compare.py --output $(OUTPUT)/comparison --baseline plain \
	  $(OUTPUT)/teacher plain=$(OUTPUT)/student $(OUTPUT)/distilled
	$(ONE_THREAD) $(RUN) tools/export.py onnx --config-file $(OUTPUT)/distilled/config.yaml --output $(OUTPUT)/student.onnx --overwrite \
	  MODEL.WEIGHTS $(OUTPUT)/distilled/model_final.pth

test: $(INSTALLED)  ## run the tests
	$(ONE_THREAD) $(RUN) -m pytest tests -q -n 2 --dist loadfile

robustness: $(INSTALLED)  ## kill and refuse every single write of a run, which make test does for a part of them
	D2_DISTILL_ROBUSTNESS=all $(ONE_THREAD) $(RUN) -m pytest tests/robustness -q -n 2

test-oldest:  ## run a part of the tests with the oldest Python and packages that setup.py admits
	@if ! bash tests/oldest/python.sh > /dev/null; then [ -n "$(SKIP_OLDEST)" ] && echo "test-oldest: skipped"; exit; fi; \
	$(MAKE) --no-print-directory $(OLDEST_VENV)/.installed && \
	OLDEST_VERSIONS=1 $(ONE_THREAD) $(OLDEST_VENV)/bin/python -m pytest $(OLDEST_TESTS) -q -n 2

$(OLDEST_VENV)/.installed: setup.py tests/oldest/constraints.txt
	"$$(bash tests/oldest/python.sh)" -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --disable-pip-version-check --use-pep517 \
	  -c tests/oldest/constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9) and \
	  "d2_distill needs Python 3.9 or newer, this is " + sys.version.split()[0] + "; say e.g. make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --use-pep517 -e '.[tools,export,timm,test]'
	touch $@
