"""What LaTtE-Flow computes: the network, the flow, the timestep experts and the sampler. No process groups, no argparse."""
