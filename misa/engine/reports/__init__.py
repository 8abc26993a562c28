"""What is made from finished runs: scores, tables, figures, pages."""
