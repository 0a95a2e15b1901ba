"""The built-in stores, each found by its entry point."""
