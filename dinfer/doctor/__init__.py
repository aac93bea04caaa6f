"""dinfer.doctor."""
