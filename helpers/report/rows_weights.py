"""Rows that the section of weights asks for."""

TECHNIQUE = "weight-statistics"
