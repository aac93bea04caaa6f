"""The report: a run, or several side by side, as one HTML file that needs no network and no kernel."""
