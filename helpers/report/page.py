"""The report's page."""

NAME = "report.html"
