"""The sparsity engine: distribution x pattern x schedule x rule, on plain pytrees."""
