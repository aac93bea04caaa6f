"""What people see of a run: the panel and its still picture. Holds a run by a small protocol; no engine, no ranks."""
