"""Kernels that others have published: the catalogue, downloads and archives."""
