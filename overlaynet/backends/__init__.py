"""The built-in backends, each found by its entry point."""
