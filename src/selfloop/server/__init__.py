"""The HTTP face: one package per wire dialect, each only translating."""
