"""Jobs: one file, one recipe and a main."""
