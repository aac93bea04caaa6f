"""ipyparallel clusters: joined or started, and the ranks in them: called, killed, brought back. Knows no models."""
