"""Everything that only a GPU can tell, in one command.

    python -m benchmarks.gpu            # from the root of a checkout; `make gpu` does it too

It builds the extension, runs the tests on the GPU, then the benchmarks, each part in a process of
its own with a time limit. What passed is not run again with the same code on the same GPU, so a run
that is stopped, or out of time, goes on when it is started again.
"""
