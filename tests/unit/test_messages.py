"""Messages between session and rank: each is served by somebody, and comes out of its bytes as it went in."""

from __future__ import annotations

import pytest
from msgspec.msgpack import encode

from dinfer.cluster.threads import LocalRanks
from dinfer.messages import (
    AllStands,
    Beat,
    Command,
    DumpStacks,
    Edited,
    Freeze,
    KillRank,
    MeetAt,
    NotedBlock,
    NotedKv,
    RankReport,
    Reply,
    RunChosen,
    SetLimits,
    SpyOnRank,
    Stand,
    Status,
    UnknownMessage,
    pack_command,
    pack_report,
    unpack_command,
    unpack_report,
    unpack_request,
)

NOT_BY_A_SERVICE = {AllStands, Beat, DumpStacks, KillRank, MeetAt, RunChosen, SpyOnRank}
"""commands that a rank's control thread, or its watcher, takes"""


def test_every_command_is_served() -> None:
    ranks = LocalRanks(1)
    try:
        assert ranks.hosts[0].table().keys() == set(Command.__subclasses__()) - NOT_BY_A_SERVICE
    finally:
        ranks.close()


def test_commands_are_read_as_they_were_sent() -> None:
    for number, command in enumerate([Freeze(), SetLimits(((1, 2), (3,)), 4, stopping=True)]):
        request = unpack_request(pack_command(command, number))
        assert (request.number, unpack_command(request.command)) == (number, command)


@pytest.mark.parametrize(
    "report",
    [
        Edited(("K of layer 0",)),
        Status("prefill", 0, Stand((1,), (True,), (2,)), records=b"\0\1"),
        Reply(7, Stand((1,), (False,), (1,))),
        Reply(8, NotedKv(4, 0, b"\0\1\2\3", blocks=(NotedBlock(0, 1, (2**64 - 1, 0)),))),
    ],
)
def test_reports_are_read_as_they_were_sent(report: RankReport) -> None:
    assert unpack_report(pack_report(report)) == report


def test_a_tensor_is_a_frame_of_its_own() -> None:
    data = bytes(10_000)
    head, frame = pack_report(Reply(1, NotedKv(len(data), 0, data, blocks=())))
    assert frame is data
    assert len(head) < 100


@pytest.mark.parametrize("packed", [encode({"type": "Dance"}), encode({"type": "Rewind", "to": 3})])
def test_what_is_unknown_is_refused_by_name(packed: bytes) -> None:
    with pytest.raises(UnknownMessage, match=r"Dance|Rewind"):
        unpack_command(packed)
