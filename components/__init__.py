"""The stages of the loop, one package each, and the code that they share."""
