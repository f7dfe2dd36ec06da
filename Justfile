# The checks that continuous integration runs, one at a time.

default: check

# Everything, in a fresh environment.
ci:
    .ci/run

check: lint types imports test

lint:
    ruff check src tests benchmarks docs
    ruff format --check src tests benchmarks docs

types:
    mypy

imports:
    lint-imports

test:
    python -m pytest

# Look for examples that break a property: twenty times as many, others each time.
search:
    python -m pytest --hypothesis-profile=search -m hypothesis

# How far llmsize is from reality.
accuracy:
    python benchmarks/accuracy.py tests/reference

# How long a command takes to start.
startup:
    python benchmarks/startup.py

# How long an estimate takes once the model is loaded.
speed:
    python benchmarks/speed.py

# Write the generated pages and the transcripts of all pages anew.
docs:
    python docs/generate.py
    python benchmarks/accuracy.py tests/reference --page
    python tests/transcripts.py --write README.md README.ko.md docs
