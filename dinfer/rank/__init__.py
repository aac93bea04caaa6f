"""dinfer.rank."""
