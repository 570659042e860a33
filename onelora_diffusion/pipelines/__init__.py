"""diffusers' pipelines with adapters."""
