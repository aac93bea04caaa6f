"""The doctor's judgements on made-up hosts: what is told, at what state, with which fix."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import psutil
import pytest
import torch

from dinfer.config import ConfigError
from dinfer.doctor import devices
from dinfer.doctor import doctor as whole
from dinfer.doctor.devices import (
    Cuda,
    Gpu,
    Smi,
    demand,
    judge_gpus,
    judge_memory,
    judge_model,
    memory_checks,
    read_smi,
)
from dinfer.doctor.leftovers import OLD_S, Process, folder_check, orphans, process_check, read_processes
from dinfer.doctor.network import (
    Network,
    Ports,
    host_name_check,
    interface_check,
    look,
    port_check,
    try_ports,
)
from dinfer.doctor.pairs import END, SIZES, PairsMeasured, measure_link, measure_links, pairs_check
from dinfer.doctor.report import (
    WIDTH,
    Check,
    PairSpeed,
    Report,
    as_text,
    gib,
    rate,
    sentence,
    significant,
    to_json,
)
from dinfer.doctor.versions import backend_check, judge_backends, package_checks, python_check
from dinfer.model.checkpoint import check
from dinfer.plan.graph import Channel
from dinfer.temporary import new_folder
from dinfer.transport.gate import Gate
from dinfer.transport.in_process import Exchange
from dinfer.watch.probe.writing import host_in_names

# -- numbers


def test_numbers_are_short() -> None:
    texts = {0.0: "0", 0.0123: "0.012", 0.15: "0.15", 9.96: "10.0", 123.4: "123", 1234.5: "1,234"}
    assert {value: significant(value) for value in texts} == texts
    assert [rate(v) for v in (1.44e9, 2.5e7, 1200)] == ["1.4 GB/s", "25 MB/s", "1.2 kB/s"]
    assert [gib(v) for v in (3 << 30, 5 << 20)] == ["3.0 GiB", "5.0 MiB"]


# -- versions


def installed(versions: Mapping[str, str], name: str) -> str:
    if name not in versions:
        raise PackageNotFoundError(name)
    return versions[name]


def packages(**versions: str) -> dict[str, Check]:
    asked = ["torch>=2.11", "numpy>=2", "pyzmq>=26", 'mypy>=2; extra == "dev"', 'x>=1; python_version < "3"']
    return {c.name: c for c in package_checks(asked, lambda name: installed(versions, name))}


def test_packages_that_are_as_asked_share_a_line_but_for_the_great_ones() -> None:
    checks = packages(torch="2.13.0+cpu", numpy="2.1", pyzmq="27.0rc1")
    assert list(checks) == ["torch", "other packages"]
    assert checks["torch"] == Check("torch", "ok", "2.13.0+cpu  (>=2.11)")
    assert checks["other packages"].found.startswith("2 more")


def test_a_package_that_is_too_old_or_missing_is_told_by_name() -> None:
    checks = packages(torch="2.10", numpy="2.1")
    assert (checks["torch"].state, checks["torch"].fix) == ("fail", "pip install -U 'torch>=2.11'")
    assert all(version in checks["torch"].found for version in ("2.10", ">=2.11"))
    assert checks["pyzmq"].state == "fail"
    assert all(fact in checks["pyzmq"].found for fact in ("not installed", ">=26"))
    assert checks["other packages"].found.startswith("1 more")


def test_python() -> None:
    assert python_check("3.12.1", ">=3.11").state == "ok"
    assert python_check("3.10.9", ">=3.11").fix == "make a new venv with Python >=3.11"


def test_backends() -> None:
    good = judge_backends("USE_CUDA=1, USE_GLOO=ON, USE_MPI=OFF, USE_NCCL=1, ")
    assert good.found.startswith("gloo, nccl; not")
    assert judge_backends("USE_GLOO=0, USE_NCCL=ON").state == "fail"
    assert judge_backends("nothing").state == "unchecked"
    assert backend_check().state == "ok"


# -- GPUs

H200 = Gpu("NVIDIA H200", 139 << 30, 140 << 30)


def test_gpus_are_named_with_their_free_memory() -> None:
    found = judge_gpus(Cuda("2.13", "13.0", [H200, Gpu("NVIDIA A10")]), Smi("580.1", ["NVIDIA H200"]), "0,1")
    assert found.state == "ok"
    facts = ("0 NVIDIA H200 (139.0 GiB of 140.0 GiB free)", "1 NVIDIA A10", "580.1", "CUDA 13.0", "=0,1")
    assert all(fact in found.found for fact in facts)
    assert judge_gpus(Cuda("2.13+cpu", "", []), None, None).state == "ok"


@pytest.mark.parametrize(
    ("cuda", "visible", "fix"),
    [
        (Cuda("2.13+cpu", "", []), None, "install a CUDA build of torch"),
        (Cuda("2.13", "13.0", []), "", "unset CUDA_VISIBLE_DEVICES"),
        (Cuda("2.13", "13.0", [], "driver too old"), None, "update the NVIDIA driver, now 470.1, to one for"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told(cuda: Cuda, visible: str | None, fix: str) -> None:
    found = judge_gpus(cuda, Smi("470.1", ["A", "B", "A"]), visible)
    assert (found.state, found.fix[: len(fix)]) == ("warn", fix)
    assert found.found.startswith("2 × A, 1 × B, but torch 2.13")


def test_the_driver_is_read() -> None:
    answer = "550.5, NVIDIA H200\n550.5, NVIDIA A10, x\n"
    assert read_smi(answer) == Smi("550.5", ["NVIDIA H200", "NVIDIA A10, x"])
    assert read_smi("No devices were found\n") is None


# -- the model and memory


def test_memory_is_judged_by_what_all_ranks_need() -> None:
    asked = demand(check("demo"), 3)
    needed = asked.bytes()
    assert judge_memory(asked, needed).state == "ok"
    assert judge_memory(asked, None).state == "unchecked"
    short = judge_memory(asked, needed - 1)
    assert (short.name, short.state, short.fix) == ("memory", "fail", "dinfer run --dtype bfloat16")
    assert all(fact in short.found for fact in ("3 ranks", gib(needed), "1,024 tokens", gib(needed - 1)))
    assert judge_memory(asked, 1000).fix == "use a smaller model, or a host with more memory"
    asked = demand(check("demo"), 9)
    available = min(asked.bytes(ranks=2), asked.bytes(dtype="bfloat16") - 1)
    assert judge_memory(asked, available).fix == "use fewer ranks here: at most 2"


def test_too_little_on_the_gpu_is_no_failure() -> None:
    found = judge_memory(demand(check("demo"), 1, "cuda:0"), 5)
    assert (found.name, found.state) == ("GPU memory", "warn")
    assert found.found.startswith("a rank needs ")


def test_a_model_must_be_there_and_have_a_layer_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = check("demo")
    assert judge_model(spec, spec.layers).state == "ok"
    fix = f"use at most {spec.layers} ranks: --world-size {spec.layers}"
    assert judge_model(spec, spec.layers + 1).fix == fix
    assert [c.state for c in memory_checks("/no/such/folder", 3, 0)] == ["fail"]
    assert [c.name for c in memory_checks("demo", 3, 0)] == ["model", "memory"]
    monkeypatch.setattr(devices, "free", lambda _: 1 << 30)
    (unnamed,) = memory_checks(None, 3, 0)
    assert unnamed.state == "unchecked"
    assert unnamed.found.startswith("1.0 GiB are free; no model")


# -- network

INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": ""}


def network(ifname: str = "", resolved: tuple[str, ...] = ("10.0.0.5",), own: str = "10.0.0.5") -> Network:
    return Network(INTERFACES, ifname, "n1", resolved, own)


def test_interface() -> None:
    assert interface_check(network()).found.startswith("lo, 127.0.0.1")
    assert interface_check(network("eth0,eth9")).found == "eth0, 10.0.0.5: set by GLOO_SOCKET_IFNAME"
    assert interface_check(network("ib0")).state == "warn"
    missing = interface_check(network("eth9"))
    assert (missing.state, missing.fix) == ("fail", "unset GLOO_SOCKET_IFNAME")
    assert "GLOO_SOCKET_IFNAME is eth9" in missing.found
    assert "lo, eth0, ib0" in missing.found


@pytest.mark.parametrize("resolved", [("127.0.1.1",), (), ("192.168.7.7",)])
def test_a_host_name_that_leads_elsewhere_is_told(resolved: tuple[str, ...]) -> None:
    found = host_name_check(network(resolved=resolved))
    assert found.state == "warn"
    assert found.fix == "for runs over several hosts: export GLOO_SOCKET_IFNAME=eth0"
    assert (resolved[0] if resolved else "does not resolve") in found.found
    assert "10.0.0.9" in host_name_check(network(resolved=resolved, own="10.0.0.9")).fix


def test_a_host_name_that_leads_here() -> None:
    assert host_name_check(network()).found == "n1 is 10.0.0.5 on eth0"
    assert host_name_check(network(own="")).state == "ok"
    assert host_name_check(network("eth0", ())).state == "ok"


def test_ports() -> None:
    good = Ports("", "", range(100, 1100), frozenset({100, 101}))
    found = port_check(good, "10.0.0.5")
    assert found.state == "ok"
    assert all(fact in found.found for fact in ("127.0.0.1 and 10.0.0.5", "998 of 1,000"))
    assert port_check(good._replace(span=None), "").state == "ok"
    assert port_check(good._replace(loopback="refused"), "").state == "fail"
    assert port_check(good._replace(own="timed out"), "10.0.0.5").state == "warn"
    few = port_check(good._replace(used=frozenset(range(100, 1050))), "")
    assert few.state == "warn"
    assert "ss -tanp" in few.fix


def test_ports_in_use_are_found(tmp_path: Path) -> None:
    (tmp_path / "sys/net/ipv4").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (tmp_path / "sys/net/ipv4/ip_local_port_range").write_text(f"{port}\t{port}\n")
        assert try_ports("", tmp_path) == Ports("", "", range(port, port + 1), frozenset({port}))
    assert try_ports("203.0.113.77", tmp_path / "none").own != ""
    assert try_ports("", tmp_path / "none").span is None


def test_ports_that_this_user_may_not_see_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: str) -> list[object]:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", refused)
    assert try_ports("").used == frozenset()


def test_this_hosts_interfaces_are_read() -> None:
    assert "127.0.0.1" in look().interfaces.values()


# -- leftovers

WORKER, WATCHER = "python3 -m dinfer.rank.worker", "python3 -m dinfer.rank.watcher 3 4"


def left(*processes: Process) -> list[int]:
    return [p.pid for p in orphans({p.pid: p for p in processes})]


def test_ranks_are_left_over_once_their_client_is_gone() -> None:
    first, adopter = Process(1, 0, "/sbin/init"), Process(5, 1, "/lib/systemd/systemd --user")
    client = Process(9, 1, "/venv/bin/python /venv/bin/dinfer run")
    assert left(first, client, Process(10, 9, WORKER), Process(11, 10, WATCHER)) == []
    ranks = Process(10, 1, WORKER), Process(11, 10, WATCHER), Process(12, 5, WORKER)
    assert left(first, adopter, *ranks) == [10, 12]
    assert left(Process(10, 9, WORKER), Process(20, 9, "python other.py")) == [10]
    # The first process of a container may be the client.
    assert left(Process(1, 0, "python /bin/dinfer run"), Process(10, 1, WORKER)) == []
    assert left(Process(1, 0, "python /bin/jupyter lab"), Process(10, 1, WORKER)) == [10]
    # Other users' processes are left out.
    assert left(first, Process(10, 1, WORKER, mine=False)) == []


def test_processes_are_read() -> None:
    own = read_processes()[os.getpid()]
    assert (own.parent, own.mine) == (os.getppid(), True)
    assert "python" in own.command


def test_leftovers_are_named_with_the_command_that_ends_them() -> None:
    found = process_check([Process(40, 1, WORKER, psutil.STATUS_STOPPED), Process(41, 1, WATCHER)])
    assert (found.state, found.fix) == ("warn", "kill -9 40 41")
    assert "rank 40 (stopped), watcher 41" in found.found
    assert process_check([Process(7, 1, WORKER)]).fix == "kill 7"
    assert process_check([]).state == "ok"


def test_old_folders_are_told_with_the_command_that_removes_them(tmp_path: Path) -> None:
    assert folder_check(tmp_path, 0.0).state == "ok"
    for name in ("dinfer-a b", "dinfer-new", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "dinfer-file").write_text("x")
    (tmp_path / "dinfer-a b" / "weights").write_bytes(bytes(1 << 20))
    now = (tmp_path / "dinfer-new").stat().st_mtime
    for path in (tmp_path / "dinfer-a b" / "weights", tmp_path / "dinfer-a b", tmp_path / "other"):
        os.utime(path, (now, now - OLD_S - 1))
    found = folder_check(tmp_path, now)
    assert all(fact in found.found for fact in ("1 of", str(tmp_path), "1.0 MiB"))
    assert found.fix == f"rm -r '{tmp_path}/dinfer-a b'"


def test_a_folder_in_use_is_not_old_however_long_nothing_has_touched_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a session that is kept open over night, and that of a job that somebody has watched, which goes on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, held = new_folder("dinfer-run-")
    assert held
    watched = tmp_path / "dinfer-watch-1"
    watched.mkdir()
    (watched / f"{host_in_names()}-{os.getpid()}-1.jsonl").touch()
    later = (tmp_path / "dinfer-watch-1").stat().st_mtime + 2 * OLD_S
    assert folder_check(tmp_path, later).state == "ok"
    held.close()
    assert folder_check(tmp_path, later).fix == f"rm -r {folder}"


def test_a_folder_that_is_written_to_is_not_old(tmp_path: Path) -> None:
    folder = tmp_path / "dinfer-doctor-1"
    folder.mkdir()
    (folder / "log").touch()
    now = folder.stat().st_mtime
    os.utime(folder, (now, now - OLD_S - 1))
    assert folder_check(tmp_path, now).state == "ok"


# -- pairs


def grid(world_size: int, **slow: float) -> list[PairSpeed]:
    pairs = [(a, b) for a in range(world_size) for b in range(world_size) if a != b]
    return [PairSpeed(a, b, 1.5e-4, slow.get(f"s{a}{b}", 1.5e9)) for a, b in pairs]


def test_pairs_are_summed_up_and_a_slow_one_is_told() -> None:
    even = pairs_check(PairsMeasured(grid(3), here={0, 1, 2}), 3)
    assert even.found == "6 links over gloo, 0.15 to 0.15 ms, 1.5 GB/s to 1.5 GB/s"
    slow = pairs_check(PairsMeasured(grid(3, s02=2e8), here={0, 1, 2}), 3)
    assert slow.state == "warn"
    assert slow.found.endswith("slower than 1/4 of the median: 0 → 2")


@pytest.mark.parametrize(
    ("measured", "state", "found", "fix"),
    [
        (
            PairsMeasured(died={1: "SIGKILL"}, errors=["lost"]),
            "fail",
            "rank 1 died of SIGKILL",
            "free memory",
        ),
        (PairsMeasured(died={2: "status 1: boom"}), "fail", "rank 2 died of status 1: boom", "pip install"),
        (PairsMeasured(errors=["rank 1 could\nnot"]), "fail", "rank 1 could", "let the firewall"),
        (PairsMeasured(here={0}), "unchecked", "only 1 of 3 ranks started", "dinfer doctor --world-size 2"),
        (
            PairsMeasured(grid(2), here={0, 1, 2}),
            "fail",
            "all ranks started, but only 2 of 6",
            "let the firewall",
        ),
    ],
)
def test_what_kept_pairs_from_being_measured(
    measured: PairsMeasured, state: str, found: str, fix: str
) -> None:
    judged = pairs_check(measured, 3)
    assert (judged.state, judged.found[: len(found)], judged.fix[: len(fix)]) == (state, found, fix)


def test_a_chosen_interface_is_the_first_suspect() -> None:
    assert pairs_check(PairsMeasured(errors=["x"]), 3, "eth7").fix == "unset GLOO_SOCKET_IFNAME"


def test_every_link_is_measured_by_the_rank_at_its_source() -> None:
    exchange = Exchange(3, Gate())
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: list(measure_links(exchange.comm(rank), 5.0)), range(3)))
    links = [[(p.source, p.target) for p in pairs] for pairs in found]
    assert links == [[(0, 1), (0, 2)], [(1, 0), (1, 2)], [(2, 0), (2, 1)]]
    assert all(p.latency_s > 0 and p.bytes_per_s > 0 for pairs in found for p in pairs)


class SlowLine:
    """A peer that answers at once, over a line of so many bytes a second, by a clock of its own."""

    rank, world_size = 0, 2

    def __init__(self, speed: float, latency: float) -> None:
        self.now, self.sent = 0.0, list[int]()
        self._speed, self._latency = speed, latency

    def send(self, _: Channel, header: bytes, payload: torch.Tensor | None) -> int:
        size = int.from_bytes(header[:8], "little", signed=True)
        self.sent.append(size)
        self.now += self._latency + (payload.nbytes / self._speed if payload is not None else 0)
        return 0

    def recv_header(self, _: Channel) -> bytes:
        self.now += self._latency
        return bytes(64)

    def recv_payload(self, channel: Channel, out: torch.Tensor) -> None:
        raise NotImplementedError

    def ahead(self, channel: Channel, most: int) -> None:
        raise NotImplementedError

    def all_gather(self, data: bytes) -> list[bytes]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("speed", "largest"), [(1e9, max(SIZES)), (2e6, 1 << 20), (125e3, 1 << 18)])
def test_a_slow_line_gets_few_bytes_and_is_measured_all_the_same(speed: float, largest: int) -> None:
    line = SlowLine(speed, latency=0.001)
    pair = measure_link(line, 1, 2.5, clock=lambda: line.now)
    assert pair.latency_s == pytest.approx(0.001)
    assert pair.bytes_per_s == pytest.approx(speed, rel=0.05)
    assert (max(line.sent), line.sent[-1]) == (largest, END)
    assert line.now < 5


def test_a_line_with_long_delays_gets_few_small_messages() -> None:
    line = SlowLine(1e9, latency=1.0)
    assert measure_link(line, 1, 2.0, clock=lambda: line.now).latency_s == 1.0
    assert line.sent.count(0) == 3


# -- the report

OK, WARN = Check("Python", "ok", "3.12"), Check("ports", "warn", "few are left", "end some")
WARNED = ["⚠", "warning", "ports", "few", "are", "left"]
FAIL, NONE = Check("torch", "fail", "x " * 80, "pip"), Check("GPUs", "unchecked", "no")


def test_the_report_reads_as_a_table() -> None:
    report = Report("n1: Linux", [OK, WARN, FAIL], grid(2), 12.3)
    text = as_text(report)
    lines = [line.split() for line in text.splitlines()]
    assert lines[:5] == [["n1:", "Linux"], [], ["✓", "ok", "Python", "3.12"], WARNED, ["→", "end", "some"]]
    assert lines.count(["from", "\\", "to", "rank", "0", "rank", "1"]) == 2
    assert ["rank", "0", "–", "0.15"] in lines
    assert ["rank", "0", "–", "1,500"] in lines
    assert all(len(line) <= WIDTH and line == line.rstrip() for line in text.splitlines())
    assert text.endswith(sentence(report))
    fix = "export " + "a " * 100  # which stays on one line
    assert f"→ {fix.strip()}\n" in as_text(Report("n1", [Check("ports", "warn", "few", fix)], [], 1.0))
    assert "?" in as_text(Report("n1", [OK], grid(2)[:1], 1.0))  # a link that was not measured
    report = Report("n1", [FAIL], [], 1.0)
    assert "\x1b[1;31m✖ error\x1b[0m" in as_text(report, colour=True)
    assert "\x1b" not in as_text(report)


def test_the_sentence() -> None:
    assert "dinfer can run here" in sentence(Report("n1", [OK], [], 1.0))
    assert "not checked: GPUs" in sentence(Report("n1", [OK, NONE], [], 1.0))
    assert "torch and torch failed" in sentence(Report("n1", [FAIL, FAIL], [], 1.0))


def test_json() -> None:
    found = json.loads(json.dumps(to_json(Report("n1", [WARN], grid(2), 1.04))))
    assert found["checks"] == [{"name": "ports", "state": "warn", "found": "few are left", "fix": "end some"}]
    assert found["pairs"][0] == {"source": 0, "target": 1, "latency_s": 1.5e-4, "bytes_per_s": 1.5e9}
    assert (found["host"], found["ok"], found["seconds"]) == ("n1", True, 1.0)


# -- the whole


def test_a_check_that_raises_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Check:
        raise OSError("no such thing")

    monkeypatch.setattr(whole, "gpu_check", broken)
    checks = {check.name: check for check in whole.examine(None, 1).checks}
    assert checks["GPUs"].state == "unchecked"
    assert "OSError: no such thing" in checks["GPUs"].found
    assert {"interface", "host name", "ports", "pairs", "old folders"} <= checks.keys()
    assert (checks["pairs"].state, checks["pairs"].found) == ("ok", "one rank has no links")


def test_pairs_are_not_measured_where_they_must_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch0")
    found = next(check for check in whole.examine(None, 3).checks if check.name == "pairs")
    assert found.state == "unchecked"
    assert "interface failed" in found.found


def test_the_exit_status_is_that_of_the_worst_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "gpu_check", lambda: Check("GPUs", "fail", "on fire", "water"))
    assert whole.doctor(None, 1, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert [c["name"] for c in found["checks"] if c["state"] == "fail"] == ["GPUs"]


def test_warnings_do_not_fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "gpu_check", lambda: Check("GPUs", "warn", "hot", "wait"))
    assert whole.doctor("demo", 1, as_json=False) == 0
    assert "\n⚠ warning  GPUs" in capsys.readouterr().out


def test_a_world_size_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="world_size is 0"):
        whole.doctor(None, 0, as_json=False)


def test_the_doctor_starts_without_torch() -> None:
    program = "import sys, dinfer.doctor.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=250).returncode == 0
