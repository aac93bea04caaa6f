"""dinfer.cluster."""
