"""One rank: it runs its lanes. The same under ipyparallel, torchrun, mpirun, or threads in one process."""
