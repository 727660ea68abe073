"""Model cards, and the bundle that lets a model run from the Hub without memzoo installed. Not written yet."""
