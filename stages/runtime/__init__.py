"""The frame of a stage: parameters, locks and signals (run), outputs that appear whole or not at all (outputs), DVC's view of
the stage (dvc), fingerprints of its code (code, source), and the common part of the two training stages (training)."""
