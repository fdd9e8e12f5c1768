"""Long runs under load, for hand and for nights: ``python -m tests.soak.kill``."""
