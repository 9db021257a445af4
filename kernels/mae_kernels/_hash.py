"""Constants of the integer hash behind :mod:`mae_kernels.ops.random_mask`, which every form of it shares."""

# Of two multiply-xorshift rounds, from the "hash prospector" search (C. Wellons, github.com/skeeto/hash-prospector).
# Both are below 2^31, so that no product of 32-bit values held in int64 overflows.
HASH_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)

# What the halves of a seed are mixed with before each is hashed to a key.
KEY_SALTS = (0x9E3779B9, 0x85EBCA6B)
