"""The named scalars of a run: what they mean, how they are summed, where they are written and shown."""
