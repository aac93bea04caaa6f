"""dinfer.transport."""
