"""Finding, starting, joining and ending ipyparallel clusters. The only package that imports ipyparallel.

Start at `attach`, which joins a running cluster or starts one, and `cluster`, a joined cluster.
"""
