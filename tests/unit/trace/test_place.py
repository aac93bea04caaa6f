"""How the place of a line is said."""

import pytest

from dinfer.trace.events import place_of


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("/home/user/infer.py", "infer.py:31"),
        ("infer.py", "infer.py:31"),
        ("/tmp/ipykernel_4242/4275506931.py", "cell:31"),  # nobody has seen a file of that name
        ("/tmp/ipykernel_4242/model.py", "model.py:31"),
    ],
)
def test_the_place_of_a_line(file: str, said: str) -> None:
    assert place_of(file, 31) == said
