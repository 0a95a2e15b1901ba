# overlaynet: `make demo` shows it at work on this machine, `make test` runs all tests, `make bench` measures,
# `make soak` runs what takes long, `make fuzz` looks for inputs that break the native engine, `make mutations` tests the
# tests, `make examples` tries the packages in plugins-example/ as their users would. Each sets up what it needs.

.PHONY: demo test examples soak mutations fuzz check bench setup clean

# What to hand to `overlaynet demo`: make demo ARGUMENTS="--store etcd --hosts 3"
ARGUMENTS =
# or to the bench: make bench ARGUMENTS="--quick"
# What to hand to pytest: make test TESTS=tests/unit
TESTS = tests
# How many files of tests run at once; most tests wait more than they work: make test JOBS=1
JOBS = 3

demo:
	@scripts/setup demo
	@.venv/bin/overlaynet demo $(ARGUMENTS)

test: setup
	@.venv/bin/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

# Not a part of `make test`: they are installed beside overlaynet's wheel, in an environment of their own.
# Some of them only: make examples EXAMPLES=plugins-example/overlaynet-sqlite
EXAMPLES =
examples: setup
	@scripts/examples $(EXAMPLES)

# The long forms of what the tests do in short: ten minutes under load for each engine, fifty times as many runs of the
# lease protocol, and at random, and whole fleets of nodes. make soak SECONDS=3600 RUNS=500 NODES=2000 ETCD_NODES=300
SECONDS = 600
RUNS = 50
NODES = 1000
ETCD_NODES = 200
soak: setup
	@echo "1 of 4: load, for $(SECONDS) seconds with each engine"
	@SOAK_SECONDS=$(SECONDS) .venv/bin/python -m pytest -rP tests/soak
	@echo "2 of 4: the lease protocol, $(RUNS) times as many runs as in the tests"
	@OVERLAYNET_MODEL_EXAMPLES_FACTOR=$(RUNS) .venv/bin/python -m pytest -v tests/conformance/test_lease_machine.py
	@echo "3 of 4: $(NODES) nodes on the memory store"
	@.venv/bin/python -m bench.convergence --store memory $(NODES)
	@echo "4 of 4: $(ETCD_NODES) nodes on etcd"
	@.venv/bin/python -m bench.convergence --store etcd $(ETCD_NODES)

# Breaks every law, and many a promise under a fault, on purpose: the tests have to fail. `make test` does a few of them.
mutations: setup
	@OVERLAYNET_MUTATIONS=all .venv/bin/python -m pytest -v tests/mutations

# Ten minutes for each target, of which the tests do seconds; what it comes to know goes into tests/fuzz/corpus: make fuzz SECONDS=3600
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
