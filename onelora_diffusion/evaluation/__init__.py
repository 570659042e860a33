"""How good generated images are: features, their statistics, distances between them, recognition."""
