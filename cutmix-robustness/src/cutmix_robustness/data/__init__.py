"""Images of both papers: the data sets, what is done to them, and what lies outside of them."""
