"""`%dinfer VERB …`: the session's calls as IPython line magics, for those who would rather not type parentheses.

Imports `session` and what lies below. Start at `line`, the table of verbs; `words` takes a line apart.
"""

from dinfer.magics.line import load_into

__all__ = ["load_into"]
