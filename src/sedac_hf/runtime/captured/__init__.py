"""Decode steps as one captured graph: what the runtime does while `torch.compile` traces the model, and around the
calls of what comes of it.

`execution` begins and ends a trace and decides in it, `parts` stand for the replaced forwards, `sites` are the cut
FFNs as tensor operations, `stats` count what a graph ran.
"""
