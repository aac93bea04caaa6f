"""What a process waits for that is no part of its run, by stacks as the probe takes them."""

import pytest

from dinfer.watch.probe.records import StacksTaken, ThreadLook
from dinfer.watching.outside import child_waited, outside_of

PYTHON = "/usr/lib/python3.11"
Frame = tuple[str, int, str, str]


def thread(*frames: Frame, user: int = 0, name: str = "MainThread") -> ThreadLook:
    return ThreadLook(name, 1, frames, user)


def said(*threads: ThreadLook) -> str:
    return outside_of(StacksTaken(1, 0, threads), "MainThread")


def mine(text: str) -> Frame:
    return ("/code/serve.py", 9, "serve", text)


SELECT: Frame = (f"{PYTHON}/selectors.py", 468, "select", "fd_event_list = self._selector.poll(timeout)")
ACCEPT: Frame = (f"{PYTHON}/socket.py", 294, "accept", "fd, addr = self._accept()")
QUEUE: Frame = (f"{PYTHON}/threading.py", 320, "wait", "waiter.acquire()")
SERVES: Frame = (f"{PYTHON}/socketserver.py", 232, "serve_forever", "ready = selector.select(poll_interval)")


@pytest.mark.parametrize(
    ("threads", "words"),
    [
        ([thread(mine("client, _ = sock.accept()"), ACCEPT, user=1)], "a connection"),
        ([thread(mine("server.serve_forever()"), SELECT, SERVES, user=1)], "a connection"),
        ([thread(mine("ready = select.select([sock], [], [])"), user=1)], "a connection"),
        ([thread(mine("line = sys.stdin.readline()"), user=1)], "input"),
        ([thread(mine("asyncio.run(main())"), SELECT, user=1)], "a connection"),
        ([thread(mine("job = requests.get()"), QUEUE, user=1)], ""),
        ([thread(mine("time.sleep(1000)"), user=1)], ""),
        ([thread(mine("dist.recv(block, 0)"), user=1)], ""),
        (
            [thread(mine("job = requests.get()"), QUEUE, user=1), thread(SELECT, SERVES, name="http")],
            "a connection",
        ),
        ([thread(mine("job = requests.get()"), QUEUE, user=1), thread(SELECT, name="logger")], ""),
    ],
)
def test_a_request_is_waited_for(threads: list[ThreadLook], words: str) -> None:
    assert said(*threads) == words


@pytest.mark.parametrize(("for_lock", "words"), [(None, "a connection"), (True, "a connection"), (False, "")])
def test_a_call_into_c_that_is_in_no_lock_waits_for_no_thread(for_lock: bool | None, words: str) -> None:
    """Its line may read like a queue's: what it is in, the system says."""
    serves = thread(SELECT, SERVES, name="http")
    in_c = thread(mine("done = device.wait()"), user=1)._replace(for_lock=for_lock)
    assert said(in_c, serves) == words
    in_queue = thread(mine("job = requests.get()"), QUEUE, user=1)._replace(for_lock=for_lock)
    assert said(in_queue, serves) == "a connection"


def test_a_select_that_only_its_own_process_can_end_is_no_request() -> None:
    alone = thread(mine("ready = select.select([sock], [], [])"), user=1)._replace(for_itself=True)
    assert said(alone) == ""
    assert said(alone, thread(SELECT, SERVES, name="http")) == "a connection"
    assert said(alone, thread(SELECT, SERVES, name="http")._replace(for_itself=True)) == ""


def test_a_message_comes_from_outside_whatever_its_library_waits_for() -> None:
    """Its own thread may tell the one that waits, by a pair of sockets of the process."""
    for call in ("parts = socket.recv_multipart()", "job = socket.recv_json()", "job = loads(socket.recv())"):
        assert said(thread(mine(call), user=1)._replace(for_itself=True)) == "a message from outside"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("request = socket.recv()", "a message from outside"),
        ("request = socket.recv(flags=0)", "a message from outside"),
        ("part = group.recv([block], 0, 0)", ""),
        ("dist.recv(block, src=0)", ""),
    ],
)
def test_a_bare_recv_is_that_of_zeromq(call: str, words: str) -> None:
    assert said(thread(mine(call), user=1)) == words


def test_a_pipe_to_another_process_is_none_of_zeromq() -> None:
    pipe: Frame = (f"{PYTHON}/multiprocessing/connection.py", 395, "_recv", "chunk = read(handle, remaining)")
    assert said(thread(mine("job = pipe.recv()"), pipe, user=1)) == ""


def test_an_engine_of_a_notebook_whose_cell_is_over_serves_nobody() -> None:
    kernel: Frame = ("/site-packages/ipykernel/kernelapp.py", 739, "start", "self.io_loop.start()")
    assert said(thread(SELECT, kernel)) == ""


def test_a_callback_that_sleeps_is_no_request() -> None:
    """The user's frame is the innermost, though the loop below it is a library's."""
    loop: Frame = (
        f"{PYTHON}/asyncio/events.py",
        80,
        "_run",
        "self._context.run(self._callback, *self._args)",
    )
    assert said(thread(mine("time.sleep(1000)"), loop, user=1)) == ""


@pytest.mark.parametrize(
    "frames",
    [
        (mine("subprocess.run(command)"), SELECT, (f"{PYTHON}/subprocess.py", 2021, "_communicate", "")),
        (mine("worker.join()"), (f"{PYTHON}/multiprocessing/popen_fork.py", 27, "poll", "")),
        (
            mine("torch.multiprocessing.spawn(main, nprocs=2)"),
            SELECT,
            (f"{PYTHON}/multiprocessing/connection.py", 947, "wait", ""),
            ("/site-packages/torch/multiprocessing/spawn.py", 138, "join", ""),
        ),
        (mine("os.waitpid(pid, 0)"),),
    ],
)
def test_a_child_is_waited_for(frames: tuple[Frame, ...]) -> None:
    taken = StacksTaken(1, 0, (thread(*frames, user=1),))
    assert child_waited(taken, "MainThread")
    assert outside_of(taken, "MainThread") == ""


def test_the_thread_that_issues_ops_counts() -> None:
    serves, works = thread(SELECT, SERVES), thread(mine("time.sleep(9)"), user=1, name="engine")
    taken = StacksTaken(1, 0, (serves, works))
    assert outside_of(taken, "engine") == ""
    assert outside_of(taken, "MainThread") == "a connection"
