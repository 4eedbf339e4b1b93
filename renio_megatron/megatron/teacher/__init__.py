"""Teachers: layouts, weights and hidden states."""
