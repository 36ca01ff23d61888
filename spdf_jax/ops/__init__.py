"""Fast mathematics that knows no model: attention and its patterns, products with blocks of zeros."""
