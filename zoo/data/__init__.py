"""Text in, batches out: sources, tokenisers, token stores, data order. Knows no model."""
