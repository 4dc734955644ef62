"""One thin typed wrapper per kernel interface. Knows nothing of jails."""
