"""The built-in routers, each found by its entry point."""
