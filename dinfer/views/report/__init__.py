"""The report: one run, or several side by side, as a self-contained HTML file.

Start at `page`, which writes it; `facts` says what is in it, `compared` what differs between runs.
"""
