"""What only CPUs need: convolutions and pooling that XLA computes slowly there."""
