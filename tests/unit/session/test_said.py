"""What calls return, as a notebook shows it."""

from __future__ import annotations

import pytest

from dinfer.session.said import Moved, Said, Where
from dinfer.verdict.verdict import Verdict

LINE = "rank 0: received block c2 l1 from <2>"


@pytest.mark.parametrize(
    "said",
    [Moved(((0,),), ((1,),), False, (LINE,)), Where("paused", LINE), Verdict("paused", LINE)],
    ids=lambda said: type(said).__name__,
)
def test_its_html_is_its_text_escaped_and_breaks_between_words(said: Said | Verdict) -> None:
    html = said._repr_html_()
    assert str(said).replace("<", "&lt;").replace(">", "&gt;") in html
    for rule in ("white-space:pre-wrap", "overflow-wrap:break-word", "word-break:normal"):
        assert rule in html
