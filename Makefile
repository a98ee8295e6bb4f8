# Everything that a target needs it installs itself; what each does is in setup/.

PYTHON ?= /usr/bin/python3
setup := $(PYTHON) -B -m setup
MAKEFLAGS += --no-print-directory

.PHONY: session down clean test check soak lint bench lock image docs

session: ## set up what is missing, then a session; ARGS are those of `beaker session create`
	@$(setup) session $(value ARGS)

down: ## stop what `make session` started; sessions run on unless Docker Engine is stopped
	@$(setup) down

clean: ## down, and remove its state
	@$(setup) clean

test: ## everything, real parts included, side by side; ARGS are pytest's
	@$(setup) test $(value ARGS)

check: lint ## the quick part: lint, types, import directions, unit tests
	@.venv/bin/python -m pytest -q -n auto --maxprocesses 4 --no-loadscope-reorder tests/unit

soak: ## the fault campaign: MINUTES=30, DRIVER=oci or docker, SEED= to repeat; SWEEP=1 kills at every event instead
	@$(setup) soak minutes=$(MINUTES) driver=$(DRIVER) seed=$(SEED) sweep=$(SWEEP)

lint:
	@$(setup) develop
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy

bench: ## compare with docker, write bench/README.md
	@$(setup) bench

lock: ## write requirements*.txt anew
	@$(setup) lock

image: ## the default image; with BASE=cuda one with CUDA for this machine's driver, or on any base, named NAME
	@$(setup) build "$(BASE)" "$(or $(NAME),beaker-sessions/cuda)"

docs: ## the guides as a site in build/site, and docs/reference.md from the commands
	@$(setup) develop
	@.venv/bin/python -m setup.reference
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet
