"""What can be sent and received, what owns its descriptors, and who counts it."""
