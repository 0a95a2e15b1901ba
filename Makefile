# overlaynet: `make demo` shows it at work on this machine, `make test` runs all tests, `make bench` measures,
# `make soak` looks for leaks, `make fuzz` for inputs that break the native engine, `make examples` tries the packages in
# plugins-example/ as their users would.
# Each sets up what it needs.

.PHONY: demo test examples soak fuzz check bench setup clean

# What to hand to `overlaynet demo`: make demo ARGUMENTS="--store etcd --hosts 3"
ARGUMENTS =
# or to the bench: make bench ARGUMENTS="--quick"
# What to hand to pytest: make test TESTS=tests/unit
TESTS = tests

demo:
	@scripts/setup demo
	@.venv/bin/overlaynet demo $(ARGUMENTS)

test: setup
	@.venv/bin/python -m pytest $(TESTS)

# Not a part of `make test`: they are installed beside overlaynet's wheel, in an environment of their own.
# Some of them only: make examples EXAMPLES=plugins-example/overlaynet-sqlite
EXAMPLES =
examples: setup
	@scripts/examples $(EXAMPLES)

# Ten minutes under load, of which the tests do one: make soak SECONDS=3600
SECONDS = 600
soak: setup
	@SOAK_SECONDS=$(SECONDS) .venv/bin/python -m pytest -rP tests/soak

# As long, of which the tests do seconds; what it comes to know goes into tests/fuzz/corpus: make fuzz SECONDS=3600
fuzz: setup
	@.venv/bin/python -m tests.fuzz.fuzzing $(SECONDS)

check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	for package in plugins-example/*/; do .venv/bin/mypy "$$package" || exit; done

bench:
	@scripts/setup bench
	@.venv/bin/python -m bench $(ARGUMENTS)

setup:
	@scripts/setup test

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
