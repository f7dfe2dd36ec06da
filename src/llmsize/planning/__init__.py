"""What fits, what would have to change, and what to do with the machines at hand."""
