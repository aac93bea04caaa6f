"""The fault lab: ranks of a real cluster misbehave on purpose, and what is said of it is judged by code."""
