"""Which implementation runs, and how C++ and Triton are built and launched."""
