"""A report's worth of what is known of a run, also hostile; for tests of the report and for browsers. Not a test."""

from __future__ import annotations

from dinfer.trace.findings import Findings, KvFinding, RankFinding, with_findings
from dinfer.trace.trace import Trace

HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)>\"'><b>&珀斯"


def told(trace: Trace, text: str = "some text") -> Trace:
    """The trace of a run that ended well, with everything known that can be, `text` wherever a run has text."""
    layers = trace.about["layers"]
    ranks = tuple(
        RankFinding(rank, "cpu", "here", "float32", 1, "ab" * 32, (4, 7, 1), error=text, log=text)
        for rank in trace.ranks
    )
    kv = KvFinding(
        False,
        f"rank 1 differs at layer 1, K, head 0, token 3 ({text!r}), dim 5: 0.0312 against −1.75",
        tuple(
            tuple("differs" if (rank, layer) == (1, 1) else "same" for layer in range(layers))
            for rank in trace.ranks
        ),
        ({"rank": 1, "layer": 1, "chunk": 0, "tensor": "K", "token": text},),
        1,
        ((1, 0, 1),),
    )
    return with_findings(
        trace,
        Findings(
            made="2026-11-25 10:00",
            state="done",
            parameters={"chunk_size": 8, "temperature": 0.0, "model_path": text},
            versions={"dinfer": "0.1.0"},
            machine={"processor": text},
            proved=True,
            proof=f"proved: {text}",
            ranks=ranks,
            kv=kv,
            message=text,
            breakpoints=(text,),
            hits=(text,),
            faults=(text,),
            edited=(text,),
            corrupt=(text,),
            log=(text,),
            commands={"In a terminal": text},
            prompt=text,
            text=text,
            chunk_texts=(text,) * len(trace.received(0)),
            environment={text: text},
        ),
    )
