"""What the wire format computes: checksums, tier maps, checks of scales."""
