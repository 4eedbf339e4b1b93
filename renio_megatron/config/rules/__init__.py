"""Rules about combinations of settings of several sections or models."""
