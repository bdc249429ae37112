"""Export to runtimes of browsers, phones and embedded machines."""
