"""Other solvers of `otreg.transport_plan`, which loads each when it is asked for."""
