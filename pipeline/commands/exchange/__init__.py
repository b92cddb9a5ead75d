"""Commands that exchange caches with other tools: `import` and `export`."""
