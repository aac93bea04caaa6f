"""How bytes get from rank to rank, and what is said of them on the way."""
