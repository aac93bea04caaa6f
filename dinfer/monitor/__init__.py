"""dinfer.monitor."""
