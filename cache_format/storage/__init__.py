"""Where a cache lives: directories, object stores, local copies, and claims between writers."""
