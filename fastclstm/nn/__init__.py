"""Tables of small functions: activations, initializers."""
