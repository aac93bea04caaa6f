"""Views of a run: the panel, its figures and still pictures, and the HTML report.

Views know a run only by the protocol in `protocol` and import no rank, engine or cluster. Start at `panel`, then
`desk`.
"""
