"""The base of all other packages: errors, seeds, collectives, the mesh, replaced forwards."""
