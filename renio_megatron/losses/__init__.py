"""The losses over sharded logits and hidden states: where the mathematics meets the shards."""
