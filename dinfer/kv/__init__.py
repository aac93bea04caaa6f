"""dinfer.kv."""
