"""Why a run does not move: who waits for whom, for what, and who is to blame.

Pure, standard library only: it reads signs of life or recorded events and returns a verdict. Start at `judge`.
"""
