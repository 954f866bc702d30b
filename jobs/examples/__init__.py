"""Job specs to start from, and `demo`, the whole journey in one file."""
