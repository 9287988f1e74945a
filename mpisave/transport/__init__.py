"""Transports: how payload comes to the ranks that write."""
