"""dinfer.launch."""
