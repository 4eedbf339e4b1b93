"""The method as plain tensor math. Read `reference.py` first; nothing here knows about ranks."""
