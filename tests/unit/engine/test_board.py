"""The board: another process never reads half an update."""

import subprocess
import sys

from dinfer.engine.board import BOARD_BYTES, MAX_LANES, Board, DeviceMemory, Stand, anonymous_file, map_file

WRITER = """
import sys
from dinfer.engine.board import BOARD_BYTES, Board, map_file
board = Board(map_file(int(sys.argv[1]), BOARD_BYTES))
for n in range(1, 100_000):
    board.set_lane(3, n, n, started=False)
board.set_phase("done", 7)
"""


def test_what_is_written_is_read() -> None:
    board = Board()
    board.set_phase("decode", 12)
    board.set_lane(0, 5, 9, started=True)
    board.set_lane(MAX_LANES - 1, 2**31 - 1, 2**31 - 1, started=False)
    assert (board.phase, board.decoded) == ("decode", 12)
    assert board.stand(2) == Stand((5, 0), (True, False), (9, 0))
    assert board.stand(MAX_LANES).limits[-1] == board.stand(MAX_LANES).positions[-1] == 2**31 - 1


def test_device_memory_is_there_once_a_rank_has_a_gpu_and_touches_no_lane() -> None:
    board = Board()
    board.set_lane(MAX_LANES - 1, 3, 4, started=True)
    assert board.device_memory is None
    board.set_device_memory(DeviceMemory(5 << 40, 6 << 40, 7 << 40))
    assert board.device_memory == (5 << 40, 6 << 40, 7 << 40)
    assert board.stand(MAX_LANES).positions[-1] == 3
    board.set_device_memory(None)
    assert board.device_memory is None


def test_another_process_sees_only_what_was_written() -> None:
    descriptor = anonymous_file(BOARD_BYTES)
    board = Board(map_file(descriptor, BOARD_BYTES))
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(descriptor)], pass_fds=(descriptor,))
    last, seen = 0, set()
    while writer.poll() is None:
        stand = board.stand(4)
        assert stand.positions[3] == stand.limits[3] >= last
        last = stand.positions[3]
        seen.add(last)
    assert writer.returncode == 0
    assert (board.phase, board.decoded) == ("done", 7)
    assert len(seen) > 2
