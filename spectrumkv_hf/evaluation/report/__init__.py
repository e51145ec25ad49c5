"""What came out: cells on disk, tables, figures, and the environment beside them."""
