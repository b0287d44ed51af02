"""The serving core: an event loop and no Ray. Gate, keys, uploads, batches."""
