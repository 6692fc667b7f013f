"""Data that lies elsewhere: URLs in the data paths, and a bounded copy of their files on this host."""
