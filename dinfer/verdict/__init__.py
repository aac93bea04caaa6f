"""Why a run does not move: who waits for whom, for what, and who is to blame.

Pure, standard library only: it reads signs of life and returns a verdict. Start at `judge`.
"""
