"""`python -m dinfer` is the command line: what `torchrun -m dinfer run` and `mpirun python -m dinfer run` start."""

from dinfer.cli import main

if __name__ == "__main__":
    main()
