"""The demo: compares the methods on handwritten digits with noisy labels."""
