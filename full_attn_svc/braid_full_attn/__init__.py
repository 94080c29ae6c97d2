"""The full-attention service: softmax attention over paged keys and values."""
