"""dinfer.bench."""
