"""The planner: what layers and links cost, measured; how long a plan would take; and which plan to run.

Pure: `engine.measure` measures, `plan.timing` simulates.
"""
