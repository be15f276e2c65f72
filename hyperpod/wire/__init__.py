"""Sans-IO protocol cores: bytes in, bytes and events out; no sockets, no clocks."""
