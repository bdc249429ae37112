"""The report of a bundle as HTML, Markdown and JSON."""
