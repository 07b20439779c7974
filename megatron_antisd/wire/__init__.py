"""Bytes from ranks that hold a tensor one way to ranks that need it another way: boxes, instructions, transports, checksums. Knows no models."""
