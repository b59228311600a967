"""C++ kernels for CPUs, compiled at first use: what ``kernels="native"`` in a ``Config`` computes with.

The whole network's is :mod:`jrl.networks.native`. Each device of the CPU computes its own calls on its own thread.
"""
