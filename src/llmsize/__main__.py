"""`python -m llmsize`."""

from llmsize.cli import main

main()
