"""Finding, starting, joining and ending ipyparallel clusters. The only package that imports ipyparallel.

Start at `choice`, which decides between joining a running cluster and starting one, and `cluster`, a joined cluster.
"""
