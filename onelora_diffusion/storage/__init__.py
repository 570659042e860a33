"""Adapter files: this library's own, and those of LoRA, DoRA and MiSS."""
