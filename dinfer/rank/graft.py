"""How a session writes into a rank's KV, for `run.graft`: as the rank's user would by hand."""

from collections.abc import Callable

import safetensors.torch

from dinfer.engine.engine import Engine
from dinfer.engine.faults import differing
from dinfer.messages import BlockWritten, Edited, RankReport, WriteBlock
from dinfer.rank.commands import Handler, slow

PARTS = {"K": slice(0, 1), "V": slice(1, 2), "": slice(0, 2)}


def graft_command(engine: Callable[[], Engine], report: Callable[[RankReport], None]) -> Handler:
    """The rank must stand. What its user had edited before is reported first."""

    def take(command: WriteBlock) -> BlockWritten:
        changed, before = write_block(engine(), command)
        name = command.part or "K and V"
        what = [
            *before,
            *[f"{name} of block c{command.chunk} l{command.layer}"] * (changed > 0 and not command.undo),
        ]
        if what:
            report(Edited(tuple(what)))
        return BlockWritten(changed)

    return slow(WriteBlock, take)


def write_block(engine: Engine, command: WriteBlock) -> tuple[int, list[str]]:
    """Write the block, and take its digests anew; how many values changed, and what the user had edited before. Raises
    RuntimeError for a block that is not here, or does not lie where it should."""
    prompt, key = engine.prompt, (command.chunk, command.layer)
    place = f"rank {prompt.rank}: block c{command.chunk} l{command.layer}"
    if not prompt.executor.holds_block(*key):
        raise RuntimeError(f"{place} is not here yet.")
    if prompt.state.extra.get(command.layer):
        raise RuntimeError(f"{place} does not lie where it should: a fault has added rows to its layer.")
    edited = prompt.new_edits()
    block = prompt.state.block(*key)[:, PARTS[command.part]]
    given = safetensors.torch.load(command.data)["tensor"].to(block.device)
    if given.shape != block.shape or given.dtype != block.dtype:
        shapes = f"{list(given.shape)} {given.dtype}, and it holds {list(block.shape)} {block.dtype}"
        raise RuntimeError(f"{place} was given {shapes}.")
    if changed := differing(block.contiguous(), given.contiguous()):
        block.copy_(given)
        prompt.new_edits()
    return changed, edited
