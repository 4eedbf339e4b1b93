"""The teachers: their layouts, weights and hidden states."""
