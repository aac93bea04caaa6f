"""ipyparallel clusters: finding, starting, joining and ending them. The only package that imports ipyparallel.

Start at `attach`, which joins a running cluster or starts one, and `cluster`, a joined cluster.
"""
