"""cupaged: a research toolkit for PagedAttention."""
