"""Live: the KV that a run's ranks hold just now, as a Source."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dinfer.engine.hosting.commands import Message
from dinfer.engine.ledger import Digests, Key
from dinfer.engine.probes import as_numbers
from dinfer.session.kv.line import Line
from dinfer.session.kv.source import Held, Noted, Shown, Subject


class Live(Shown):
    """Of ranks that stand."""

    def __init__(self, subject: Subject, line: Line) -> None:
        self._subject, self.line = subject, line

    def called(self, name: str) -> "Live":
        """The same under another name, to be told from another run."""
        return Live(replace(self._subject, name=name), self.line)

    @property
    def subject(self) -> Subject:
        return self._subject

    @property
    def ranks(self) -> Sequence[int]:
        return range(self._subject.plan.world_size)

    @property
    def bytes_moved(self) -> int:
        return self.line.bytes_moved

    def held(self, ranks: Sequence[int]) -> list[Held]:
        answers = self.line.ask(ranks, "kv_held")
        return [Held(tuple(answer["spans"]), tuple(answer["rows"])) for answer in answers]

    def digests(self, ranks: Sequence[int], layers: Sequence[int], spans: Sequence[range]) -> list[Tensor]:
        places = [[span.start, span.stop] for span in spans]
        return self.line.tensors(ranks, "kv_digests", layers=list(layers), spans=places)

    def noted(self, ranks: Sequence[int], layers: Sequence[int]) -> list[dict[Key, Noted]]:
        found = list[dict[Key, Noted]]()
        for rank, answer in zip(ranks, self.line.ask(ranks, "kv_noted", layers=list(layers)), strict=True):
            digests = self.line.tensor(rank, answer)
            blocks = zip(answer["blocks"], digests, strict=True)
            noted = {(one[0], one[1]): _noted(as_numbers(came), one[2:]) for one, came in blocks}
            for chunk, of_layer in answer["edited"]:
                noted[chunk, of_layer] = noted[chunk, of_layer]._replace(edited=True)
            found.append(noted)
        return found

    def noted_rows(self, rank: int, chunk: int, layer: int) -> Tensor | None:
        answer = self.line.ask([rank], "kv_noted_rows", chunk=chunk, layer=layer)[0]
        return None if "none" in answer else self.line.tensor(rank, answer)

    def rows(self, rank: int, layer: int, places: range) -> Tensor:
        return self.line.tensors([rank], "kv_rows", layer=layer, start=places.start, stop=places.stop)[0]

    def values(self, rank: int, layer: int, places: Sequence[int]) -> Tensor:
        return self.line.tensors([rank], "kv_values", layer=layer, places=list(places))[0]

    def summary(self, rank: int, layer: int, places: range) -> Message:
        return self.line.ask([rank], "kv_summary", layer=layer, start=places.start, stop=places.stop)[0]

    def part(self, rank: int, layer: int, tensor: int, heads: Sequence[int], places: Sequence[int]) -> Tensor:
        some = {"tensor": tensor, "heads": list(heads), "places": list(places)}
        return self.line.tensors([rank], "kv_part", layer=layer, **some)[0]

    # -- what only ranks can tell

    def hidden_first(self, rank: int) -> dict[int, int]:
        """By chunk, the first layer before which a rank has its hidden state."""
        return dict(self.line.ask([rank], "hidden_held")[0]["first"])

    def hidden_summary(self, rank: int, chunk: int, layer: int) -> Message:
        return self.line.ask([rank], "hidden_summary", chunk=chunk, layer=layer)[0]

    def hidden(self, rank: int, chunk: int, layer: int) -> Tensor:
        """Before a layer, [tokens, hidden_size]."""
        return self.line.tensors([rank], "hidden", chunk=chunk, layer=layer)[0]

    def attention(self, rank: int, chunk: int, layer: int, heads: Sequence[int]) -> tuple[Tensor, int]:
        """The weights of these heads, none for all, [heads, queries, keys], and the first key's token."""
        answer = self.line.ask([rank], "attention", chunk=chunk, layer=layer, heads=list(heads))[0]
        return self.line.tensor(rank, answer), answer["first_key"]


def _noted(came: Digests, announced: Sequence[int]) -> Noted:
    return Noted(came, (announced[0], announced[1]) if announced else came)
