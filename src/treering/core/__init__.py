"""What everything else stands on: errors, seeds, collectives, the mesh, replaced forwards."""
