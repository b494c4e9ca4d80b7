"""Figures of the report, drawn from recorded rows."""
