"""dinfer.saved."""
