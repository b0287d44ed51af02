"""The whole story on real handwritten digits, in one command: ``make demo``."""
