"""The client: ranks up and down, the run that a user steps, the watch for progress."""
