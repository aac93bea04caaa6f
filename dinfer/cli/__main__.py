"""`python -m dinfer.cli`."""

from dinfer.cli import main

main()
