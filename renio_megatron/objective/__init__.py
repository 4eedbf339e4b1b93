"""The method as plain tensor mathematics. Read `reference.py` first; nothing here knows about ranks."""
