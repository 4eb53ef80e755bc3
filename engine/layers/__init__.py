"""What architectures share: attention, feed-forward, rotary positions."""
