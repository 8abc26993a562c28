"""Reports on runs and data: scores, tables, figures, pages."""
