"""Benches: what prefill and a session take on this machine, side by side."""
