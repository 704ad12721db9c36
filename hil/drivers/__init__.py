"""One wire protocol a module, the codec apart from its transport."""
