"""Parts of `train_faim.py`, each a module with one job."""
