"""Stage 1: human rankings from files, S3 or a dataset hub become one immutable, content-addressed snapshot."""
