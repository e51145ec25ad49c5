"""What is measured: ways to hold a cache, models, texts."""
