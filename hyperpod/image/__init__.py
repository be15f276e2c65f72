"""Images: references, pulls by skopeo, conversion of layers to read-only block images, the durable store."""
