"""Process group, FSDP and collectives."""
