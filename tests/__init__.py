"""The tests; they share makers of good inputs (`bundles.py`)."""
