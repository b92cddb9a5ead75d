"""Commands about this installation rather than about caches and students: `env` and `completion`."""
