"""Rules about settings that several sections or models make together."""
