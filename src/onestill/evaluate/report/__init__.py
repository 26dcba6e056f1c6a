"""The report of an evaluation: one page of HTML and one JSON file."""
