"""Training: one readable loop (`train.py`) and the small objects it calls."""
