"""What is said of it: tables, figures, results on disk."""
