"""Ways to search the grid of a layer, one file each, all with one function of one signature:

    search_grid(weight, inputs, scheme, settings) -> LayerGrid

`weight` is (N, K), `inputs` holds recorded rows (m, K) for each timestep group. `mse` searches ranges and clips alone;
`svdquant`, `viditq` and `qdm` first find what the scheme adds to a layer (a scale of its inputs, a low-rank branch) and leave
the rest to `mse`. A method (qvgen/methods) names the one it uses.
"""
