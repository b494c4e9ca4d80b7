"""Running notebooks headless: which are due, the execution of one, and what every notebook must look like."""
