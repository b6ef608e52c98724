"""Cut FFNs on a GPU: kernels in Triton, and the engine that runs them outside captured graphs.

Gate and up have kernels per cut (`truncate`, `select`) on common tiles (`tiles`), down has one for both (`down`);
`launch` has the tile sizes. Captured graphs get them as operators of `sedac_hf.ops.library`. `engine` and `launch` can
be imported without Triton.
"""
