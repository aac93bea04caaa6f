"""Runs: one prefill and decode as its user holds it; how it is stepped, stopped, seen."""
