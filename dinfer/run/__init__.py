"""dinfer.run."""
