"""Views: figures and what shows them. Figures are pure functions of a trace or of measured figures."""
