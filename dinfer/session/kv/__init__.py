"""KV as a session sees it: what is held, where it differs, and how that came about."""
