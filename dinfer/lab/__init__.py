"""dinfer.lab."""
