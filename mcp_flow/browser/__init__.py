"""The browser: which one, the detached host that owns it, and a run's own session in it."""
