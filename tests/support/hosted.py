"""The mark of tests that make hosts on this machine. Not a test."""

import pytest

from dinfer.lab.hosts import why_not

WHY_NOT = why_not()
needs_hosts = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
