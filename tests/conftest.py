"""What every test shares: one thread a rank, no network, the choice of slow tests, the time of each part.

Fixtures are in tests/support/fixtures.py and probed.py; only those of the browser tests stand beside them, since they
need a browser.
"""

from __future__ import annotations

import os

# Before anything imports torch or transformers; processes that tests start inherit both.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import signal
import sys
from collections import defaultdict
from random import Random, SystemRandom

import pytest
from hypothesis import settings

pytest_plugins = ["tests.support.fixtures", "tests.support.probed"]

# A shell that runs tests in the background has them ignore Ctrl-C, and so would all that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How many examples a property gets is settled here, but where a test needs a number of its own; CI draws the same ones
# each time.
settings.register_profile("local", deadline=None, max_examples=40)
settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=300)


SHORT_S = 500
"""a test that may take longer is drawn into no sample: it would be all that CI has time for"""


SHARED = ("lab", "foreground", "daemonized", "browser")
"""fixtures that last for the whole session and take long to start"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """--slow, --slow-sample N and --slow-seed S; without these (and without -m) slow tests are left out."""
    group = parser.getgroup("dinfer")
    group.addoption("--slow", action="store_true", help="run slow tests too")
    group.addoption(
        "--slow-sample", type=int, default=0, metavar="N", help="run N slow tests, drawn at random"
    )
    group.addoption(
        "--slow-seed", type=int, metavar="S", help="the seed that draws them (default: a new one)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Settle how thorough to be, and the seed, so that the header can name it; begin to count time."""
    quick = "ci" if os.environ.get("CI") == "true" else "local"
    settings.load_profile("thorough" if config.option.slow else quick)
    if (
        config.option.slow_seed is None
    ):  # the processes among which pytest-xdist shares out tests must draw the same
        seed = os.environ.setdefault("DINFER_SLOW_SEED", str(SystemRandom().randrange(10_000)))
        config.option.slow_seed = int(seed)
    config.pluginmanager.register(PartTimes(), "dinfer-part-times")


def pytest_report_header(config: pytest.Config) -> str:
    """Which slow tests this session runs."""
    if _chosen_by_user(config):
        return "slow tests: as asked for"
    sample, seed = config.option.slow_sample, config.option.slow_seed
    return f"slow tests: --slow-sample {sample} --slow-seed {seed}" if sample else "slow tests: none (--slow)"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests, but for a sample of those that -k and the like have left."""
    if getattr(config.option, "loadgroup", False):
        _group(items)
    if _chosen_by_user(config):
        return
    slow = {item.nodeid: item for item in items if item.get_closest_marker("slow")}
    short = sorted(name for name, item in slow.items() if _longest_s(item) <= SHORT_S)
    drawn = Random(config.option.slow_seed).sample(short, min(config.option.slow_sample, len(short)))
    left_out = slow.keys() - drawn
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


def pytest_collection_finish() -> None:
    """A process that has imported torch by now computes with one thread, as ranks do."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _group(items: list[pytest.Item]) -> None:
    """What `--dist loadgroup` keeps in one process: the tests that share one of SHARED, which are run before the
    others, and those of a file."""
    groups = {item: _group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: [*SHARED, groups[item]].index(groups[item]))


def _group_of(item: pytest.Item) -> str:
    fixtures = set(getattr(item, "fixturenames", ()))
    if "session" in fixtures and item.get_closest_marker("cluster"):
        fixtures.add("daemonized")
    return next((name for name in SHARED if name in fixtures), item.nodeid.partition("::")[0])


def _longest_s(item: pytest.Item) -> float:
    """How long the test may take."""
    limit = item.get_closest_marker("timeout")
    return float(limit.args[0]) if limit else 0.0


def _chosen_by_user(config: pytest.Config) -> bool:
    return bool(config.option.slow or config.option.markexpr)


class PartTimes:
    """Adds up the time that tests of each folder under tests/ take, and says it at the end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test: set-up, call or teardown."""
        self.seconds[report.nodeid.removeprefix("tests/").split("/")[0]] += report.duration

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        """The table; importing and collecting are not in it. The seed again: -q hides the header."""
        terminalreporter.section("time")
        terminalreporter.write_line(pytest_report_header(config))
        for part, seconds in self.seconds.items():
            terminalreporter.write_line(f"{part:<12}{seconds:8.1f} s")
