"""Stage: ends a run whose gate failed, with the code that forbids a retry."""
