"""How the stages are run: the graph (dag), as a Prefect flow (flow, runners, guard), on a schedule (retrain), one run at a
time (checkout), and what is recorded of a run as a whole (lineage)."""
