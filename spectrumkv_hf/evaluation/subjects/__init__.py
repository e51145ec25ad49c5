"""What is measured: caches, models, texts."""
