"""`gad doctor --gpu`: the GPU path proved and timed on the card that is there (`--device cpu`: a rehearsal)."""
