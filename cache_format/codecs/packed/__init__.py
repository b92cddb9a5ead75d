"""The packed encoding: targets entropy-coded with rANS, about two thirds of the bytes."""
