"""The methods: what an adapter computes and holds at one layer, one method a file."""
