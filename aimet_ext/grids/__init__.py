"""Weight grids of a simulation: set when it is created, or changed afterwards."""
