"""Launching: the ranks of `dinfer run` up, watched and down again, started here or by another launcher."""
