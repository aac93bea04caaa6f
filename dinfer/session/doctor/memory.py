"""Free memory of this host against what the model named needs."""

from dinfer.session.doctor.check import Check


def memory_check(model: str | None, world_size: int) -> Check:
    return Check("memory", "unchecked", "no model named to compare with", "dinfer doctor --model PATH")
