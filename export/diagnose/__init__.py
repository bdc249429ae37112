"""Find which part of a graph does not compute what its checkpoint computes."""
