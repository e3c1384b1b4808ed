"""What a stage runs in: parameters, locks and signals (run), outputs that appear whole or not at all (outputs), what DVC knows
of it (dvc), and what the two stages of training share (training)."""
