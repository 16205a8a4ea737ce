"""What experiments share: timing, ceilings, traffic, and how a result is written and shown."""
