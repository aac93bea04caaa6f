"""dinfer.kv.reference."""
