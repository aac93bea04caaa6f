"""dinfer.saved.replay."""
