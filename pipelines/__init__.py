"""The graphs, their profiles, and the client that runs and submits them."""
