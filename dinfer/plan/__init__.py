"""What every rank will do, as pure data: ops, lanes, schedules, proofs and cuts. Standard library only."""
