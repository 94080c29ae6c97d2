"""The linear-attention service: recurrences over states of fixed size."""
