"""What every rank will do, as pure data: ops, lanes, schedules, cuts and proofs.

Standard library only. Start at `ops` and `plan`; `schedule` builds plans, `verify` proves or refutes them, `cut` steps.
"""
