"""Views of a run: the panel, figures and still pictures, and the HTML report.

Views know a run only by the protocol in `protocol` and import no rank, engine or cluster. What stands here is pure
(cells, bins, timeline, find), or is a run as views hold it (protocol, read_only, recorded). On it stand `figures`,
`report`, `panel`, and `served`, the panel without a notebook. Start at `panel`.
"""
