"""Asking students and judging what they say."""
