"""Many adapters of one base, each request with its own, drawn together in one batch."""
