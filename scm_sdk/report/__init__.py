"""Everything that is known about a bundle, on one page: HTML for people, Markdown for reviews, JSON for machines."""
