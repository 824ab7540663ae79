"""Data by name, and what is trained on them."""
