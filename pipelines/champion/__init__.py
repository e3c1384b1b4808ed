"""Which registered model is champion: the rules (gate), the decision and the move (promote), and reading the registry."""
