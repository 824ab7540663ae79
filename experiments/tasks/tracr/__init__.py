"""Weights of compiled programs, and the script that makes them."""
