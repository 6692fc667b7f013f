"""How a rank gets its micro-batches: schedule (which rows), core (from whom), sockets (bytes), prefetch (arrays), feed."""
