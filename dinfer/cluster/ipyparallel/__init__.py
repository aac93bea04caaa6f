"""dinfer.cluster.ipyparallel."""
