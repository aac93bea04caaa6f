"""`%dinfer VERB …`: the session's calls as IPython line magics, for those who would rather not type parentheses."""

from dinfer.magics.line import load_into

__all__ = ["load_into"]
