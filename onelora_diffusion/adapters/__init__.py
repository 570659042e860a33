"""What an adapter computes: one method a file."""
