"""Why a run does not move: who waits for whom, for what, and who is to blame. Pure; standard library only."""
