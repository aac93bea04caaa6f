"""Runs as folders: written from ranks that stand, opened anywhere, compared with other runs, live or saved."""
