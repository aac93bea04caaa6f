"""The session: from `dinfer.connect` to the run that it returns.

Imports everything below but `views`, which is handed in. Start at `connect`, then `session`.
"""
